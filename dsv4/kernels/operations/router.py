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

from dsv4.formats.config import ModelConfig
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, kernel
from dsv4.kernels.operations.gemv import STEP, Weight, matrix_of, random_weight
from dsv4.kernels.reference.linear import dequantize_rows
from dsv4.kernels.reference.router import route_by_hash, route_by_score

IMPLEMENTATION = "dsv4.kernels.sm90.router.route:Router"
CHAIN = 4  # MMAs of 16 columns, of which a sum is a chain


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
        table = Argument("tid2eid", torch.int64, (shape.vocab, shape.top_k))
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
            yield case(other, model, 8, "twins", twins=True)
            for name, size in {"zeros": 0.0, "tiny": 1e-4, "huge": 30.0}.items():
                yield case(other, model, 3, name, size, twins=True)


def case(
    shape: Shape, model: str, rows: int, name: str = "", size: float = 1.0, twins: bool = False
) -> Case:
    """size: of the logits. twins: experts 2i and 2i + 1 have equal gates, hence equal scores."""
    made = router(shape)

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        gate = random_weight(shape.gate, "", rng)
        if twins:
            _copy_rows(shape, gate)
        x = torch.randn(rows, shape.hidden, generator=rng, device=device)
        buffers: Buffers = {"x": (x * size * _unit(shape)).to(torch.bfloat16), **gate}
        if shape.hashed:
            pick = torch.rand(shape.vocab, shape.experts, generator=rng, device=device)
            buffers["tid2eid"] = pick.topk(shape.top_k, 1).indices
            ids = torch.randint(shape.vocab, (rows,), generator=rng, device=device)
            buffers["ids"] = ids.to(torch.int32)
        else:
            bias = torch.randn(shape.experts, generator=rng, device=device) / 4
            buffers["bias"] = bias.repeat_interleave(2)[: shape.experts] if twins else bias
            while (close := _too_close(shape, buffers)).any():
                fresh = torch.randn(rows, shape.hidden, generator=rng, device=device)
                fresh = (fresh * size * _unit(shape)).to(torch.bfloat16)
                buffers["x"] = torch.where(close[:, None], fresh, buffers["x"])
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
        (Launch(made),),
        shape.gate.nbytes + rows * (2 * shape.hidden + 8 * shape.top_k),
        make,
        lambda buffers: expect(shape, buffers),
        cold=tuple(one.name for one in shape.gate.operands()[:2]),
        note="one launch",
    )


def _unit(shape: Shape) -> float:
    """What brings logits of random weights near 1: see `random_weight`."""
    rms = {"nvfp4": 2.9 * 2.0**-9 * 130, "bf16": 1.0}[shape.kind]
    return float(1 / (rms * shape.hidden**0.5))


def _copy_rows(shape: Shape, gate: Buffers) -> None:
    """Make every odd row the row before it."""
    codes = gate["codes"].view(-1, shape.experts, gate["codes"].shape[-1])
    codes[:, 1::2] = codes[:, 0::2]
    if shape.kind == "nvfp4":  # tile, column tile, row % 32, row // 32, column
        scales = gate["scales"].view(*gate["scales"].shape[:3], 32, 4, 4)
        scales[..., 1::2, :, :] = scales[..., 0::2, :, :]


def expect(shape: Shape, buffers: Buffers) -> dict[str, Expected]:
    """The reference's choice and its weights, which are quotients of affinities."""
    logits, _, relative = _affinities(shape, buffers)
    if shape.hashed:
        ids = buffers["ids"].to(torch.int64)
        idx, weights = route_by_hash(logits, ids, buffers["tid2eid"], shape.scaling)
    else:
        idx, weights = route_by_score(logits, buffers["bias"], shape.top_k, shape.scaling)
    own = relative.gather(1, idx).amax(1, keepdim=True)
    return {
        "topk_idx": Expected(idx),
        "topk_weights": Expected(weights, weights * (2 * own + 2.0**-20) + 1e-30),
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
    scores = (affinity + buffers["bias"]).sort(1, descending=True).values[:, : shape.top_k + 1]
    gaps = scores.diff(dim=1).abs()
    return ((gaps > 0) & (gaps < 2 * slack)).any(1)
