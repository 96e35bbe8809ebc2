"""The experts of a layer for 1 to 8 tokens: w13, SwiGLU, routing weight, w2 and the sum.

    y[t] = sum over i of w2[e] · bf16(weight[t, i] · silu(min(g, L)) · clamp(u, -L, L))
    e = topk_idx[t, i],  g, u = w13[e] · x[t]

The experts are NVFP4, each in a record (see `record`) that a table finds, and the shared expert,
whose weight is 1, is FP8, as they lie in the store.
Reference: `dsv4.kernels.reference.moe`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import FP8_BLOCK, SLABS
from dsv4.kernels.core.contract import Buffers, Case, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.kernels.ops.experts.record import Record
from dsv4.kernels.ops.experts.reference import expected, record_parts

MAX_ROWS = STEP_ROWS
COUNTERS = 2
IMPLEMENTATION = "dsv4.kernels.ops.experts.kernel:Experts"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts of one layer; shared: with the shared expert in the same launch."""

    hidden: int
    inter: int
    experts: int
    top_k: int
    limit: float
    shared: bool = False

    @classmethod
    def of(cls, config: ModelConfig, shared: bool = False) -> Shape:
        """The experts of a model."""
        c = config
        return cls(
            c.hidden_size,
            c.moe_intermediate_size,
            c.n_routed_experts,
            c.num_experts_per_tok,
            c.swiglu_limit,
            shared,
        )

    @property
    def expert_nbytes(self) -> int:
        """Codes and scales of one expert's three projections."""
        return 3 * self.hidden * self.inter * 9 // 16

    @property
    def shared_nbytes(self) -> int:
        """Codes and scales of the shared expert, if it is there."""
        return (
            3 * (self.hidden * self.inter + self.hidden * self.inter // FP8_BLOCK**2) * self.shared
        )

    def shared_expert(self, *names: str) -> tuple[Argument, ...]:
        """Codes and scales of the shared expert's "1", "3" or "2"."""
        arguments: list[Argument] = []
        for name in names if self.shared else ():
            rows, cols = (self.hidden, self.inter) if name == "2" else (self.inter, self.hidden)
            slabs = SLABS if name == "2" else 1
            tiles = (rows // FP8_BLOCK, cols // FP8_BLOCK)
            codes = (slabs, rows, cols // slabs)
            arguments.append(Argument(f"shared_codes{name}", torch.uint8, codes))
            arguments.append(Argument(f"shared_scales{name}", torch.uint8, tiles, align=4))
        return tuple(arguments)

    @property
    def record(self) -> Record:
        """How an expert's bytes lie."""
        return Record(self.hidden, self.inter)

    def placed(self) -> tuple[Argument, ...]:
        """The table of the records' places, and the records: of this layer and of any others."""
        return (
            Argument("places", torch.int32, (self.experts,), align=4),
            Argument("records", torch.uint8, ("records", self.record.nbytes)),
        )

    def global_scale(self, name: str) -> Argument:
        """The global scales of "13" or "2", as they lie in the store."""
        sizes = self.experts, 2 if name == "13" else 1
        return Argument(f"global_scale{name}", torch.float32, sizes, align=4)


def experts(
    shape: Shape, out: str = "float32", tuning: Mapping[str, int | bool] | None = None
) -> Kernel:
    """The kernel for one shape. out: "float32" or "bfloat16".

    A token's experts are all different; a number that is not an expert's chooses nothing, and
    neither does an expert whose place is -1, so that a rank may hold some of the experts. What is
    computed does not depend on places. h: scratch, a row for each choice
    and, with a shared expert, for each token. counters: zero, and
    zero afterwards. ctas: the device's multiprocessors; the launch needs all of them at once, so
    two launches that share the device must not overlap.
    """
    rows, top_k = "rows", shape.top_k
    return kernel(
        "experts",
        IMPLEMENTATION,
        {
            "hidden": shape.hidden,
            "inter": shape.inter,
            "limit": shape.limit,
            "shared": shape.shared,
            "out": out,
            **tuned(shape),
            **(tuning or {}),
        },
        (
            Argument("x", torch.bfloat16, (rows, shape.hidden)),
            Argument("topk_idx", torch.int32, (rows, top_k), align=4),
            Argument("topk_weights", torch.float32, (rows, top_k), align=4),
            *shape.placed(),
            (shape.global_scale("13"), *shape.shared_expert("1", "3")),
            (shape.global_scale("2"), *shape.shared_expert("2")),
            Argument("h", torch.bfloat16, ("activations", shape.inter), "out"),
            Argument("counters", torch.int32, (COUNTERS,), "inout", align=4),
            Argument("y", getattr(torch, out), (rows, shape.hidden), "out"),
            Argument("ctas", int),
        ),
    )


def tuned(shape: Shape) -> dict[str, int | bool]:
    """Warps that divide the columns, and slots: what shared memory holds beside the activations."""
    many = shape.hidden % 2048 == 0 and shape.inter % 2048 == 0 and shape.hidden <= 4096
    return {"warps": 16 if many else 8, "slots": 3 if many else 4, "pdl": True}


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Random choices for each number of rows, the same in every run; without and with shared."""
    for shared in (False, True):
        for count in rows:
            name = "routed, shared" if shared else "routed"
            yield case(Shape.of(config, shared), model, random_choices(config, count), name)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Inputs that a benchmark does not meet, on a few experts of the real shape."""
    shape = dataclasses.replace(Shape.of(config), experts=64)
    both = dataclasses.replace(shape, shared=True)
    top_k = shape.top_k
    for rows in range(1, MAX_ROWS + 1):
        choices = torch.arange(rows * top_k).view(rows, top_k)
        yield case(shape, model, choices, "all different")
        yield case(both, model, choices, "all different, shared")
    same = torch.tensor([[9, 60, 2, 33, 0, 63]])[:, :top_k]
    yield case(shape, model, same.expand(MAX_ROWS, -1), "all the same")
    single = torch.full((MAX_ROWS, top_k), -1)
    single[:, 0] = 17
    yield case(both, model, single, "one expert, shared")
    absent = torch.arange(MAX_ROWS * top_k).view(MAX_ROWS, top_k) % 11
    absent[3], absent[5, 1:], absent[6, 0] = -1, shape.experts, 1 << 30
    yield case(shape, model, absent, "some not here")
    yield case(shape, model, absent * 0 - 1, "none here")
    yield case(both, model, absent * 0 - 1, "none here, shared")
    for scales in ((0, 8), (1, 2), (0x78, 0x7F)):
        choices = torch.arange(3 * top_k).view(3, top_k).flip(1) * 2
        yield case(shape, model, choices, f"scale codes {scales[0]} to {scales[1] - 1}", scales)
    zeros = random_choices(dataclasses.replace(config, n_routed_experts=64), 2)
    yield case(shape, model, zeros, "weights of 0 and -0", codes=0x88)


def random_choices(config: ModelConfig, rows: int) -> Tensor:
    """`[rows, k]`, a token's all different."""
    rng = torch.Generator().manual_seed(rows)
    picks = torch.rand(rows, config.n_routed_experts, generator=rng).argsort(1)
    return picks[:, : config.num_experts_per_tok]


def case(
    shape: Shape,
    model: str,
    choices: Tensor,
    name: str = "routed",
    scales: tuple[int, int] = (0, 0x7F),
    out: str = "float32",
    tuning: Mapping[str, int | bool] | None = None,
    codes: int = 0xFF,
) -> Case:
    """Tokens that chose `choices`. scales: the range of E4M3 scale codes. codes: bits of E2M1."""
    rows, top_k = choices.shape
    here = choices[(choices >= 0) & (choices < shape.experts)]
    distinct = len(set(here.tolist()))
    small = rows * (shape.hidden * 6 + top_k * 8)
    one = experts(shape, out, tuning)
    chains = int(dict(one.config)["warps"])

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        x = torch.randn(rows, shape.hidden, generator=rng, device=device)
        weights = torch.rand(rows, top_k, generator=rng, device=device) + 0.05
        if top_k > 1:
            weights[:, -1] *= (torch.arange(rows, device=device) % 3 != 2).to(torch.float32)
        return {
            "x": x.to(torch.bfloat16),
            "topk_idx": choices.to(device, torch.int32).contiguous(),
            "topk_weights": weights * (1.5 / weights.sum(1, keepdim=True)),
            **random_records(shape, rng, scales, codes),
            **random_shared(shape, rng),
            "h": torch.empty(
                rows * (top_k + shape.shared), shape.inter, dtype=torch.bfloat16, device=device
            ),
            "counters": torch.zeros(COUNTERS, dtype=torch.int32, device=device),
            "y": torch.empty(rows, shape.hidden, dtype=getattr(torch, out), device=device),
            "ctas": multiprocessors(device),
        }

    return Case(
        "experts",
        name,
        model,
        rows,
        (Launch(one),),
        distinct * shape.expert_nbytes + shape.shared_nbytes + small,
        make,
        lambda buffers: expected(shape, buffers, chains),
        cold=("records", *(a.name for a in shape.shared_expert("1", "3", "2"))),
        note=f"{distinct} experts",
    )


def multiprocessors(device: torch.device) -> int:
    """What `ctas` has to be."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def random_records(
    shape: Shape, rng: torch.Generator, scales: tuple[int, int], mask: int = 0xFF
) -> Buffers:
    """Every code, and every scale in the range; gates of some units, so that the clamp bites.

    Places are mixed up, and there are two records more than experts. The stacks are views of the
    records, expert by expert, for those who read them so.
    """
    record, device = shape.record, rng.device
    records = torch.randint(
        0, 256, (shape.experts + 2, record.nbytes), generator=rng, device=device, dtype=torch.uint8
    )
    order = torch.randperm(shape.experts + 2, generator=rng, device=device)[: shape.experts]
    buffers: Buffers = {"places": order.to(torch.int32), "records": records}
    for name, fan_in, spread in (("13", shape.hidden, 5.0), ("2", shape.inter, 1.0)):
        codes, scale_codes = record_parts(record, records, name)
        codes &= mask
        low, high = scales
        scale_codes.copy_(
            torch.randint(
                low, high, scale_codes.shape, generator=rng, device=device, dtype=torch.uint8
            )
        )
        known = torch.arange(*scales, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale_rms = known.to(torch.float64).square().mean().sqrt().item()
        code_rms = (8.5625) ** 0.5
        base = spread / (code_rms * scale_rms * fan_in**0.5)
        size = (shape.experts, 2 if name == "13" else 1)
        factors = torch.rand(size, generator=rng, device=device) + 0.5
        buffers[f"global_scale{name}"] = factors * base
    return buffers


def random_shared(shape: Shape, rng: torch.Generator) -> Buffers:
    """Codes of the range that a rounded weight has, and scales of two octaves."""
    buffers: Buffers = {}
    for argument in shape.shared_expert("1", "3", "2"):
        if "codes" in argument.name:
            plain = torch.randn(argument.shape, generator=rng, device=rng.device)  # type: ignore[arg-type]
            buffers[argument.name] = (plain * 64).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            fan_in = shape.inter if argument.name.endswith("2") else shape.hidden
            middle = 127 - 6 - round(math.log2(fan_in) / 2) + (not argument.name.endswith("2"))
            buffers[argument.name] = torch.randint(
                middle - 1,
                middle + 2,
                argument.shape,  # type: ignore[arg-type]
                generator=rng,
                device=rng.device,
                dtype=torch.uint8,
            )
    return buffers
