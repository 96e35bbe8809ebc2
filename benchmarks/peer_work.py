"""What peers compute: real shapes' products and experts, their weights in rows, and references.

Values are those that our cases have, in one layout that is nobody's: rows without slabs, tiles or
interleaving. Scales are normal numbers, and gate and up share a global scale, as every format of
others has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.codecs import dequantize_fp8
from dsv4.formats.numeric.layouts import unpack_fp8, unpack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import Fp8Matrix, Nvfp4Matrix
from dsv4.kernels.core.contract import Buffers, Case
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.experts.reference import operand
from dsv4.kernels.ops.gemv import contract as gemv

SHAPES = ("lm_head", "wq_b", "wo_a", "wo_b", "shared w1 w3", "shared w2")
SCALES = (0x08, 0x7F)  # E4M3 codes of normal numbers
PRODUCT_UNIT, EXPERTS_UNIT = 2.0**-8, 2.0**-5  # tolerances of peers, see `kernel_peers`
PARTIAL_SUMS = 8  # four of them, each up to four times its usual size, rounded by half a unit


@dataclasses.dataclass(frozen=True)
class Product:
    """`y = x wᵀ` in rows. x bfloat16 `[M, G, K]`; codes float8_e4m3fn `[N, K]` with scales E8M0
    uint8 `[N/128, K/128]`, or codes uint8 `[N, K/2]` with scales float8_e4m3fn `[N, K/16]` and a
    factor float32 `[1]`.
    """

    x: Tensor
    codes: Tensor
    scales: Tensor
    factor: Tensor | None

    def front(self, rows: int) -> Product:
        """The same for the first `rows` tokens."""
        return dataclasses.replace(self, x=self.x[:rows])

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def walk(self) -> Tensor:
        """√Σ(x w)², float64 `[M, N]`: how large the partial sums of y are."""
        x, w = self.x.to(torch.float32).square(), self.plain()
        groups, k = self.x.shape[1:]
        parts = w.view(groups, -1, k)
        found = [x[:, g] @ parts[g].to(torch.float32).square().T for g in range(groups)]
        return torch.cat(found, 1).to(torch.float64).sqrt()

    def plain(self) -> Tensor:
        """The weight in bfloat16, which holds it exactly."""
        if self.factor is None:
            e8m0 = self.scales.view(torch.float8_e8m0fnu)
            return dequantize_fp8(self.codes, e8m0).to(torch.bfloat16)
        shape = self.codes.shape[0], self.codes.shape[1] * 2
        whole = NVFP4Tensor(self.codes, self.scales.view(torch.uint8), self.factor[0], shape)
        return dequantize_nvfp4(whole).to(torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Routed:
    """Experts in rows: gate's, then up's. x bfloat16 `[T, D]`; codes and scales uint8 and
    float8_e4m3fn `[E, 2I, D/2]`, `[E, 2I, D/16]`, `[E, D, I/2]`, `[E, D, I/16]`; factors float32
    `[E]`; topk_idx int32 and weights float32 `[T, k]`.
    """

    x: Tensor
    up: tuple[Tensor, Tensor, Tensor]
    down: tuple[Tensor, Tensor, Tensor]
    topk_idx: Tensor
    weights: Tensor
    limit: float

    def front(self, rows: int) -> Routed:
        """The same for the first `rows` tokens."""
        return dataclasses.replace(
            self, x=self.x[:rows], topk_idx=self.topk_idx[:rows], weights=self.weights[:rows]
        )

    @property
    def chosen(self) -> list[int]:
        """Experts that some token chose."""
        return sorted(set(self.topk_idx.flatten().tolist()))

    @property
    def nbytes(self) -> int:
        """Of the chosen experts' codes and scales."""
        stacks = (*self.up[:2], *self.down[:2])
        return sum(stack[0].nbytes for stack in stacks) * len(self.chosen)

    def plain(self, name: str) -> Tensor:
        """`up` or `down` in bfloat16, `[E, N, K]`, zero where nobody chose an expert."""
        codes, scales, factors = getattr(self, name)
        count, rows, half = codes.shape
        found = torch.zeros(count, rows, 2 * half, dtype=torch.bfloat16, device=codes.device)
        for e in self.chosen:
            one = NVFP4Tensor(codes[e], scales[e].view(torch.uint8), factors[e], (rows, 2 * half))
            found[e] = dequantize_nvfp4(one).to(torch.bfloat16)
        return found


Work = Product | Routed


@dataclasses.dataclass(frozen=True)
class Subject:
    """One shape for many tokens, of which the first few are taken.

    case: ours for so many rows; buffers: all that it needs; value, bound, tolerance: float64
    `[T, N]`, the reference, our kernel's distance from it and a peer's.
    """

    shape: str
    model: str
    case: Callable[[int], Case]
    buffers: Buffers
    work: Work
    value: Tensor
    bound: Tensor
    tolerance: Tensor

    def of_rows(self, rows: int) -> Buffers:
        """Our buffers for the first `rows` tokens; outputs are new."""
        tokens = len(self.value)
        found = dict(self.buffers)
        for argument in (one for kernel in self.case(rows).kernels for one in kernel.leaves()):
            whole = self.buffers[argument.name]
            if argument.shape[:1] in (("rows",), ("activations",)):
                found[argument.name] = whole[: len(whole) // tokens * rows].clone()
        return found

    def found(self, buffers: Buffers) -> Tensor:
        """Our result."""
        return torch.cat([buffers[name] for name in ("y", "y0", "y1") if name in buffers], 1)


def subjects(
    config: ModelConfig, model: str, rows: int, device: torch.device, shapes: str = ""
) -> Iterator[Subject]:
    """Those whose name contains `shapes`, for up to `rows` tokens."""
    weights = gemv.weights_of(config)
    for shape in SHAPES:
        if shapes in shape:
            yield product_subject(shape, model, weights[shape], rows, device)
    if shapes in "routed":
        yield routed_subject(experts.Shape.of(config), config, model, rows, device)


def product_subject(
    shape: str, model: str, weights: Sequence[gemv.Weight], rows: int, device: torch.device
) -> Subject:
    """Weights that share an input, one below the other."""

    def case(count: int) -> Case:
        return gemv.case(weights, shape, model, count)

    buffers = case(rows).make(torch.Generator(device).manual_seed(0))
    parts = []
    for index, weight in enumerate(weights):
        if weight.kind == "nvfp4":
            buffers[f"scales{index}"].clamp_(min=SCALES[0])
        matrix = gemv.matrix_of(weight, buffers, str(index))
        if isinstance(matrix, Fp8Matrix):
            codes, scales = unpack_fp8(matrix)
            parts.append((codes, scales.view(torch.uint8)))
        else:
            assert isinstance(matrix, Nvfp4Matrix)
            [one] = unpack_nvfp4(matrix)
            parts.append((one.codes, one.scales.view(torch.float8_e4m3fn)))
    codes, scales = (torch.cat([part[i] for part in parts]).contiguous() for i in range(2))
    factor = buffers["global_scale0"] if weights[0].kind == "nvfp4" else None
    found = [gemv.expected(weight, buffers, str(i)) for i, weight in enumerate(weights)]
    value = torch.cat([one.value for one in found], 1)
    bound = torch.cat([torch.as_tensor(one.tolerance) for one in found], 1)
    work = Product(buffers["x"], codes, scales, factor)
    tolerance = PRODUCT_UNIT * (value.abs() + PARTIAL_SUMS * work.walk())
    return Subject(shape, model, case, buffers, work, value, bound, tolerance)


def routed_subject(
    shape: experts.Shape, config: ModelConfig, model: str, rows: int, device: torch.device
) -> Subject:
    """The routed experts of a layer, chosen at random."""
    choices = experts.random_choices(config, rows)

    def case(count: int) -> Case:
        return experts.case(shape, model, choices[:count], scales=SCALES)

    buffers = case(rows).make(torch.Generator(device).manual_seed(0))
    buffers["global_scale13"][:, 1] = buffers["global_scale13"][:, 0]
    [value, bound] = case(rows).expect(buffers)["y"]
    assert isinstance(bound, Tensor)
    up, down = (_rows_of(shape, buffers, name) for name in ("13", "2"))
    chosen, weights = buffers["topk_idx"], buffers["topk_weights"]
    work = Routed(buffers["x"], up, down, chosen, weights, shape.limit)
    size = value.square().mean(1, keepdim=True).sqrt()
    tolerance = (EXPERTS_UNIT * size).expand_as(value)
    return Subject("routed", model, case, buffers, work, value, bound, tolerance)


def _rows_of(shape: experts.Shape, buffers: Buffers, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scales of all experts, gate's rows first."""
    codes, scales = [], []
    for expert in range(shape.experts):
        parts = unpack_nvfp4(operand(shape, buffers, name, expert))
        codes.append(torch.cat([part.codes for part in parts]))
        scales.append(torch.cat([part.scales for part in parts]))
    whole = torch.stack(scales).view(torch.float8_e4m3fn)
    return torch.stack(codes), whole, buffers[f"global_scale{name}"][:, 0].contiguous()
