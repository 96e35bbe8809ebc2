"""The router of a layer, in one launch: which experts a token visits, and with what weight.

    logits = gate · x,  affinity = sqrt(softplus(logit))
    the experts of highest affinity + bias, equal ones in order; or those a table has for the token
    weight = affinity / Σ chosen affinities · scaling

Reference: `dsv4.kernels.reference.router`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.gemv.contract import STEP, Weight, matrix_of, random_weight
from dsv4.kernels.reference.linear import dequantize_rows
from dsv4.kernels.reference.router import route_by_hash, route_by_score

IMPLEMENTATION = "dsv4.kernels.ops.router.kernel:Router"
CHAIN = 4  # MMAs of 16 columns, of which a sum is a chain
TINY = 1e-20  # in the reference's quotient
_ATTEMPTS = 32
SIZES = {"zeros": 0.0, "tiny": 1e-4, "large": 30.0, "vanishing": 300.0}
"""Of unusual logits: zeros of both signs; softplus far from its bend, and below any float32."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """kind: of the gate, "nvfp4" or "bf16". hashed: whether a table chooses."""

    kind: str
    experts: int
    hidden: int
    top_k: int
    hashed: bool
    scaling: float
    vocab: int = 0  # rows of the table
    warps: int = 4

    @classmethod
    def of(cls, config: ModelConfig, hashed: bool, kind: str = "nvfp4") -> Shape:
        """The router of a model's layer."""
        c = config
        vocab = c.vocab_size if hashed else 0
        sizes = c.n_routed_experts, c.hidden_size, c.num_experts_per_tok
        return cls(kind, *sizes, hashed, c.routed_scaling_factor, vocab)

    @property
    def gate(self) -> Weight:
        """The gate's matrix."""
        return Weight(self.kind, self.experts, self.hidden)

    @property
    def parts(self) -> int:
        """Parts that the columns are cut into, each with its own letter."""
        return self.hidden // STEP // self.warps


def router(shape: Shape, pdl: bool = True) -> Kernel:
    """The kernel for one shape.

    Arguments: x bfloat16 `[T, D]`; the gate's codes, scales, global scale; bias float32 `[E]`, or
    ids int32 `[T]` and tid2eid int64 `[V, k]`; topk_idx int32, topk_weights float32 `[T, k]`;
    letters, zero before and after. An id out of the vocabulary reads its nearest row.
    """
    config = dataclasses.asdict(shape)
    del config["vocab"]
    choice: tuple[Argument, ...] = (Argument("bias", torch.float32, (shape.experts,)),)
    if shape.hashed:
        table = Argument("tid2eid", torch.int64, ("vocab", shape.top_k))
        choice = (Argument("ids", torch.int32, ("rows",), align=4), table)
    chosen = ("rows", shape.top_k)
    return kernel(
        "router",
        IMPLEMENTATION,
        {**config, "slabs": 1, "pdl": pdl},
        (
            Argument("x", torch.bfloat16, ("rows", shape.hidden)),
            shape.gate.operands(),
            choice,
            Argument("topk_idx", torch.int32, chosen, "out", align=4),
            Argument("topk_weights", torch.float32, chosen, "out", align=4),
            Argument("letters", torch.float32, ("rows", shape.parts, shape.experts), "inout"),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """By score and by table, with the gate as recipe `standard` and as `native` have it."""
    for kind in ("nvfp4", "bf16"):
        for hashed in (False, True):
            for count in rows:
                yield case(Shape.of(config, hashed, kind), model, count)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Every number of rows, prefill, equal affinities, extreme logits."""
    shape = Shape.of(config, hashed=False)
    for count in (3, 5, 6, 7, 9, 200):
        yield case(shape, model, count)
    for kind in ("nvfp4", "bf16"):
        for hashed in (False, True):
            other = Shape.of(config, hashed, kind)
            yield case(other, model, 8, "equals", equals=True)
            for name, size in SIZES.items():
                yield case(other, model, 3, name, size, equals=True)


def case(
    shape: Shape, model: str, rows: int, name: str = "", size: float = 1.0, equals: bool = False
) -> Case:
    """size: of the logits. equals: experts come in fours of equal gates and biases (`_shared`)."""

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        buffers = random_weight(shape.gate, "", rng)
        if equals:
            _share_gates(shape, buffers)
        if shape.hashed:
            pick = torch.rand(shape.vocab, shape.experts, generator=rng, device=device)
            buffers["tid2eid"] = pick.topk(shape.top_k, 1).indices
            ids = torch.randint(shape.vocab, (rows,), generator=rng, device=device)
            buffers["ids"] = ids.to(torch.int32)
        else:
            bias = torch.randint(-512, 513, (shape.experts,), generator=rng, device=device) / 1024
            buffers["bias"] = bias[_shared(shape).to(device)] if equals else bias
        buffers["x"] = _activations(shape, rows, size, buffers, rng)
        return buffers | {
            "topk_idx": torch.empty(rows, shape.top_k, dtype=torch.int32, device=device),
            "topk_weights": torch.empty(rows, shape.top_k, device=device),
            "letters": torch.zeros(rows, shape.parts, shape.experts, device=device),
        }

    how = f"{'hash' if shape.hashed else 'score'} {shape.kind} {name}".strip()
    return Case(
        "router",
        how,
        model,
        rows,
        (Launch(router(shape)),),
        shape.gate.nbytes + rows * (2 * shape.hidden + 8 * shape.top_k),
        make,
        lambda buffers: expect(shape, buffers),
        cold=tuple(one.name for one in shape.gate.operands()[:2]),
        note="one launch",
    )


def _activations(
    shape: Shape, rows: int, size: float, buffers: Buffers, rng: torch.Generator
) -> Tensor:
    """Random ones whose choice float32 can tell: scores around it are equal or clearly apart."""
    rms = {"nvfp4": 2.9 * 2.0**-9 * 130, "bf16": 1.0}[shape.kind]  # of `random_weight`

    def some() -> Tensor:
        x = torch.randn(rows, shape.hidden, generator=rng, device=rng.device)
        x *= size / (rms * shape.hidden**0.5)
        return x.to(torch.bfloat16)

    x = some()
    for _ in range(_ATTEMPTS):
        if shape.hashed or not (close := _too_close(shape, buffers | {"x": x})).any():
            return x
        x = torch.where(close[:, None], some(), x)
    raise AssertionError("no activations with a clear choice")


def _shared(shape: Shape) -> Tensor:
    """Expert -> whose gate it has: neighbours share one, and so do the halves of all."""
    expert = torch.arange(shape.experts) % (shape.experts // 2)
    return expert - expert % 2


def _share_gates(shape: Shape, gate: Buffers) -> None:
    """Give experts the gates that `_shared` says."""
    source = _shared(shape).to(gate["codes"].device)
    if shape.kind == "bf16":
        gate["codes"] = gate["codes"][source]
        return
    gate["codes"] = gate["codes"][:, source]
    scales = gate["scales"]
    # Slab, tile, column tile, row % 32, row // 32, column: a matrix of rows and back.
    tiled = scales.view(*scales.shape[:3], 32, 4, 4).permute(0, 1, 4, 3, 2, 5)
    rows = tiled.reshape(scales.shape[0], shape.experts, -1)[:, source].view(tiled.shape)
    gate["scales"] = rows.permute(0, 1, 4, 3, 2, 5).reshape(scales.shape).contiguous()


def expect(shape: Shape, buffers: Buffers) -> dict[str, Expected]:
    """The reference's choice and its weights, which are quotients of affinities.

    Affinities below 2^-126 are zeros to the kernel.
    """
    logits, _, relative = _affinities(shape, buffers)
    if shape.hashed:
        ids = buffers["ids"].to(torch.int64)
        idx, weights = route_by_hash(logits, ids, buffers["tid2eid"], shape.scaling)
    else:
        idx, weights = route_by_score(logits, buffers["bias"], shape.top_k, shape.scaling)
    own = relative.gather(1, idx).amax(1, keepdim=True)
    lost = 2.0**-126 / TINY * shape.scaling
    return {
        "topk_idx": Expected(idx),
        "topk_weights": Expected(weights, weights * (2 * own + 2.0**-20) + lost),
        "letters": Expected(torch.zeros_like(buffers["letters"])),
    }


def _affinities(shape: Shape, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """-> logits, affinities, and the affinities' relative uncertainty; float64 `[T, E]`.

    An MMA drops at most six units of 2^-23 of the largest number it meets, which is at most the
    sum of the chain's magnitudes; a row's chains are then added, within a step, over warps and
    over parts. The affinity moves by at most half of what the logit does, relatively, and has
    `2^-19 + 2^-23 |logit|` of its own.
    """
    gate = dequantize_rows(matrix_of(shape.gate, buffers, ""), 0, shape.experts).to(torch.float64)
    x = buffers["x"].to(torch.float64)
    logits = x @ gate.T
    units = 2 * 6 * CHAIN + 1 + shape.warps + shape.parts
    error = units * 2.0**-24 * (x.abs() @ gate.abs().T)
    affinity = torch.nn.functional.softplus(logits).sqrt()
    return logits, affinity, error + 2.0**-19 + 2.0**-23 * logits.abs()


def _too_close(shape: Shape, buffers: Buffers) -> Tensor:
    """Rows in which scores around the choice differ, but by less than float32 can tell."""
    _, affinity, relative = _affinities(shape, buffers)
    slack = (affinity * relative).amax(1, keepdim=True) + 2.0**-22
    scores = (
        (affinity.to(torch.float32) + buffers["bias"])
        .sort(1, descending=True)
        .values[:, : shape.top_k + 1]
    )
    gaps = scores.diff(dim=1).abs()
    close: Tensor = (gaps > 0) & (gaps < 2 * slack)
    return close.any(1)
