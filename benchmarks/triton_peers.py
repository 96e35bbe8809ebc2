"""Plain Triton kernels of the kind others use: dequantise a tile, multiply it by tensor cores.

W8A16 on FP8 with 128x128 E8M0 scales, W4A16 on NVFP4, and experts grouped by the tokens that chose
them. Codes lie in rows, scales beside them, as checkpoints have them: neither slabs nor tiles.
NVFP4 is multiplied in float16, which holds code times scale exactly and activations of usual sizes.
Written to be fair and simple: tiles of 16 tokens, loads that Triton pipelines, the columns split
over CTAs where a form says so; of several forms a benchmark takes the fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a tile: the least that a product of tensor cores has


class Form(NamedTuple):
    """Rows and columns of a weight's tile, warps, stages, and CTAs that share a row's columns."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    split: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages" + (
            f", {self.split} parts" if self.split > 1 else ""
        )


FORMS = (
    Form(32, 128, 4, 5),
    Form(64, 128, 4, 4),
    Form(128, 128, 8, 4),
    Form(32, 128, 4, 5, 4),
    Form(64, 128, 4, 4, 4),
)
FP4_FORMS = (
    Form(32, 256, 4, 4),
    Form(64, 256, 4, 4),
    Form(128, 128, 8, 4),
    Form(64, 128, 4, 5),
)
GROUPED_FORMS = (Form(32, 128, 4, 5), Form(32, 256, 4, 4), Form(64, 128, 4, 4), Form(64, 256, 8, 3))


@triton.jit
def _fp4_tile(codes, scales, rows, K, step, COLUMNS: tl.constexpr):
    """Even and odd columns `[rows, COLUMNS / 2]` of step number `step`, float16, which holds them
    exactly without the global scale.
    """
    half = tl.arange(0, COLUMNS // 2)
    block = tl.arange(0, COLUMNS // 16)
    raw = tl.load(codes + rows[:, None] * (K // 2) + step * (COLUMNS // 2) + half[None, :])
    scale = tl.load(scales + rows[:, None] * (K // 16) + step * (COLUMNS // 16) + block[None, :])
    wide = tl.broadcast_to(scale.to(tl.float16)[:, :, None], (rows.shape[0], COLUMNS // 16, 8))
    wide = tl.reshape(wide, (rows.shape[0], COLUMNS // 2))
    return _e2m1(raw & 15) * wide, _e2m1(raw >> 4) * wide


@triton.jit
def _columns(x, here, step, COLUMNS: tl.constexpr):
    """Even and odd columns `[16, COLUMNS / 2]` of the tokens at x, float16."""
    value = tl.load(x + step * COLUMNS + tl.arange(0, COLUMNS), mask=here, other=0.0)
    return tl.split(tl.reshape(value.to(tl.float16), (16, COLUMNS // 2, 2)))


@triton.jit
def _e2m1(code):
    """An E2M1 code's value: its bits are those of a float16 by 2^-14."""
    wide = code.to(tl.uint16)
    bits = ((wide & 8) << 12) | ((wide & 7) << 9)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _product(
    x,
    codes,
    scales,
    factor,
    y,
    M,
    N,
    K: tl.constexpr,
    per_group,
    stride,
    FP4: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.arange(0, 16)
    here = token[:, None] < M
    x += (first // per_group) * K + token[:, None] * stride
    total = tl.zeros((16, ROWS), tl.float32)
    for step in range(tl.program_id(1), K // COLUMNS, SPLIT):
        if FP4:
            even, odd = _fp4_tile(codes, scales, rows, K, step, COLUMNS)
            left, right = _columns(x, here, step, COLUMNS)
            total = tl.dot(right, tl.trans(odd), tl.dot(left, tl.trans(even), total))
        else:
            column = step * COLUMNS + tl.arange(0, COLUMNS)
            raw = tl.load(codes + rows[:, None] * K + column[None, :])
            power = tl.load(scales + (first // 128) * (K // 128) + step * COLUMNS // 128)
            scale = (power.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
            value = tl.load(x + column, mask=here, other=0.0)
            total += tl.dot(value, tl.trans(raw.to(tl.bfloat16))) * scale
    if FP4:
        total *= tl.load(factor)
    out = y + token[:, None] * N + rows[None, :]
    if SPLIT == 1:
        tl.store(out, total, mask=here)
    else:
        tl.atomic_add(out, total, mask=here)


@triton.jit
def _grouped(
    x,
    codes,
    scales,
    factors,
    slots,
    experts,
    weights,
    y,
    N,
    K: tl.constexpr,
    top_k,
    limit,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.load(experts + tl.program_id(1)).to(tl.int64)
    slot = tl.load(slots + tl.program_id(1) * 16 + tl.arange(0, 16))
    here = slot[:, None] >= 0
    source = slot // top_k if GATED else slot
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x += source[:, None] * K
    height = 2 * N if GATED else N
    codes += expert * height * (K // 2)
    scales += expert * height * (K // 16)
    total = tl.zeros((16, ROWS), tl.float32)
    other = tl.zeros((16, ROWS), tl.float32)
    for step in range(K // COLUMNS):
        left, right = _columns(x, here, step, COLUMNS)
        even, odd = _fp4_tile(codes, scales, rows, K, step, COLUMNS)
        total = tl.dot(right, tl.trans(odd), tl.dot(left, tl.trans(even), total))
        if GATED:
            even, odd = _fp4_tile(codes, scales, rows + N, K, step, COLUMNS)
            other = tl.dot(right, tl.trans(odd), tl.dot(left, tl.trans(even), other))
    factor = tl.load(factors + expert)
    total *= factor
    if GATED:
        gate = tl.minimum(total, limit)
        up = tl.minimum(tl.maximum(other * factor, -limit), limit)
        weight = tl.load(weights + slot, mask=slot >= 0, other=0.0)
        total = gate * tl.sigmoid(gate) * up * weight[:, None]
    out = y + slot[:, None] * N + rows[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def _activate(x, weights, y, N, limit, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * N + column).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + column).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate * tl.sigmoid(gate) * up * tl.load(weights + row)
    tl.store(y + row * N + column, value.to(y.dtype.element_ty))


def activate(gate_up: Tensor, weights: Tensor, limit: float) -> Tensor:
    """SwiGLU by the routing weight: bfloat16 `[T k, 2 I]`, gate's columns first -> `[T k, I]`."""
    rows, width = gate_up.shape
    y = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    _activate[(width // 2 // 256, rows)](gate_up, weights, y, width // 2, limit, BLOCK=256)
    return y


def product(x: Tensor, codes: Tensor, scales: Tensor, factor: Tensor | None, form: Form) -> Tensor:
    """`x wᵀ`, float32 `[M, N]`.

    x: bfloat16 `[M, G, K]`; codes: float8_e4m3fn `[N, K]` or uint8 `[N, K/2]`; scales: uint8
    `[N/128, K/128]`, or float8_e4m3fn `[N, K/16]` with factor float32 `[1]`.
    """
    tokens, groups, k = x.shape
    n = codes.shape[0]
    make = torch.empty if form.split == 1 else torch.zeros
    y = make(tokens, n, device=x.device)
    _product[(n // form.rows, form.split)](
        x,
        codes,
        scales,
        factor,
        y,
        tokens,
        n,
        k,
        n // groups,
        groups * k,
        FP4=factor is not None,
        ROWS=form.rows,
        COLUMNS=form.columns,
        SPLIT=form.split,
        num_warps=form.warps,
        num_stages=form.stages,
    )
    return y


class Stack(NamedTuple):
    """All experts' rows of one projection: codes uint8 `[E, N, K/2]`, scales float8_e4m3fn
    `[E, N, K/16]`, factors float32 `[E]`.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor


def slots_by_expert(topk_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Who computes what: experts int32 `[B]`, and the choices of each `[B, 16]`, -1 where none."""
    chosen: dict[int, list[int]] = {}
    for slot, expert in enumerate(topk_idx.flatten().tolist()):
        chosen.setdefault(expert, []).append(slot)
    slots = torch.full((len(chosen), TOKENS), -1, dtype=torch.int32)
    for row, found in enumerate(chosen.values()):
        slots[row, : len(found)] = torch.tensor(found, dtype=torch.int32)
    experts = torch.tensor(list(chosen), dtype=torch.int32)
    return experts.to(topk_idx.device), slots.to(topk_idx.device)


def experts(
    x: Tensor,
    up: Stack,
    down: Stack,
    places: tuple[Tensor, Tensor],
    weights: Tensor,
    limit: float,
    form: Form,
) -> Tensor:
    """Three launches: gate and up with SwiGLU, down, the sum. Float32 `[T, D]`.

    x: bfloat16 `[T, D]`; up: gate's rows, then up's; places: `slots_by_expert`; weights: float32
    `[T, k]`.
    """
    tokens, top_k = weights.shape
    inter, hidden = up.codes.shape[1] // 2, down.codes.shape[1]
    h = torch.empty(tokens * top_k, inter, dtype=torch.bfloat16, device=x.device)
    parts = torch.empty(tokens * top_k, hidden, device=x.device)
    ids, slots = places
    for given, stack, found, rows, columns in (
        (x, up, h, inter, hidden),
        (h, down, parts, hidden, inter),
    ):
        _grouped[(rows // form.rows, len(ids))](
            given,
            *stack,
            slots,
            ids,
            weights,
            found,
            rows,
            columns,
            top_k,
            limit,
            GATED=found is h,
            ROWS=form.rows,
            COLUMNS=form.columns,
            num_warps=form.warps,
            num_stages=form.stages,
        )
    return parts.view(tokens, top_k, hidden).sum(1)
