"""The value of the experts of a layer on a kernel's buffers, and its distance from float32's.

Buffers and shape are those of `dsv4.kernels.ops.experts.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv4.formats.numeric.layouts import dequantize
from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    INTERLEAVE,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    SLABS,
    Fp8Matrix,
    Nvfp4Matrix,
)
from dsv4.kernels.core.bounds import chained, rounded_range
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.ops.experts.record import Record
from dsv4.kernels.reference.moe import split_gate_up

if TYPE_CHECKING:
    from dsv4.kernels.ops.experts.contract import Shape


def expected(shape: Shape, buffers: Buffers, chains: int) -> dict[str, Expected]:
    """The exact value for activations rounded once, and how far float32 sums may lead from it.

    chains: parts of the columns that are summed apart.

    An activation of uncertainty d, from the sums (`chained`), the scales and SwiGLU, is rounded to
    bfloat16: it may come out as anything between the roundings of a - d and a + d, mostly one
    value. That range meets |w2|; the sums of w2 add their own uncertainty.
    """
    rows, top_k = buffers["topk_idx"].shape
    y = torch.zeros(rows, shape.hidden, dtype=torch.float64, device=buffers["x"].device)
    bound = torch.zeros_like(y)
    for token in range(rows):
        chosen = [int(e) for e in buffers["topk_idx"][token]]
        here = [place for place in range(top_k) if is_here(buffers["places"], chosen[place])]
        parts = [_expert(shape, buffers, token, chosen[i], i, chains) for i in here]
        if shape.shared:
            parts.append(_shared(shape, buffers, token))
        for value, error in parts:
            y[token] += value
            bound[token] += error
    if buffers["y"].dtype == torch.bfloat16:
        bound = bound * (1 + 2.0**-8) + y.abs() * 2.0**-8
    return {
        "y": Expected(y, bound),
        "counters": Expected(torch.zeros_like(buffers["counters"])),
    }


def _expert(
    shape: Shape, buffers: Buffers, token: int, expert: int, place: int, chains: int
) -> tuple[Tensor, Tensor]:
    """One token at one expert: (value, uncertainty), float64 `[D]`."""
    x = buffers["x"][token].to(torch.float64)
    sums = chained(x, matrix(shape, buffers, "13", expert), chains, "nvfp4")
    gate_up = [split_gate_up(part[None], INTERLEAVE) for part in sums]
    scales = buffers["global_scale13"][expert].to(torch.float64)
    gate, up = ((gate_up[0][i][0] * scales[i], gate_up[1][i][0] * scales[i]) for i in range(2))
    act, error = activated(gate, up, shape.limit)
    weight = buffers["topk_weights"][token, place].to(torch.float64)
    act, error = act * weight, error * weight.abs()
    value, off = _down(act, error, matrix(shape, buffers, "2", expert), chains, "nvfp4")
    scale = buffers["global_scale2"][expert, 0].to(torch.float64)
    return value * scale, off * scale.abs()


def _shared(shape: Shape, buffers: Buffers, token: int) -> tuple[Tensor, Tensor]:
    """One token at the shared expert, whose scales are part of each step's sum."""
    x = buffers["x"][token].to(torch.float64)
    w1, w2, w3 = (
        dequantize(shared_operand(shape, buffers, name)).to(torch.float64) for name in "123"
    )
    gate, up = (chained(x, w, shape.hidden // FP8_BLOCK, "fp8") for w in (w1, w3))
    act, error = activated(gate, up, shape.limit)
    return _down(act, error, w2, shape.inter // FP8_BLOCK, "fp8")


def _down(act: Tensor, error: Tensor, w2: Tensor, chains: int, kind: str) -> tuple[Tensor, Tensor]:
    """Through w2: (value, uncertainty)."""
    h, spread = rounded_range(act, error + act.abs() * 2.0**-23)
    value, off = chained(h, w2, chains, kind)
    # Sums of a step or of an expert join others, at most 15 times, and then those of 16 warps.
    adds = 32 * 2.0**-24 * (w2.abs() @ h.abs())
    return value, off + adds + w2.abs() @ spread


def activated(
    gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], limit: float
) -> tuple[Tensor, Tensor]:
    """SwiGLU of (value, uncertainty); |silu'| < 1.1, and float32's exponential and reciprocal are
    good to some units of the last place of their result, the exponent's rounding times |gate|.
    """
    (g, dg), (u, du) = ((v, d + v.abs() * 2.0**-23) for v, d in (gate, up))
    if limit:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    bent = torch.nn.functional.silu(g)
    d_bent = 1.1 * dg + bent.abs() * (g.abs() + 6) * 2.0**-22 + 2.0**-126
    return bent * u, d_bent * (u.abs() + du) + bent.abs() * du + (bent * u).abs() * 2.0**-23


def is_here(places: Tensor, expert: int) -> bool:
    """Whether the number of an expert is one, and it has a record."""
    return 0 <= expert < len(places) and int(places[expert]) >= 0


def record_parts(record: Record, records: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Views of records `[R, nbytes]`: codes `[R, S, N, K/S/2]`, scales `[R, S, N/128, K/S/64, 512]`
    of "13" (one slab) or "2".
    """
    if name == "13":
        at, scales_at, slabs, rows, cols = 0, record.scales13_at, 1, 2 * record.inter, record.hidden
    else:
        at, scales_at = record.codes2_at, record.scales2_at
        slabs, rows, cols = SLABS, record.hidden, record.inter
    cols //= slabs
    codes = records[:, at : at + slabs * rows * cols // 2]
    scales = records[:, scales_at : scales_at + slabs * rows * cols // 16]
    tiles = (slabs, rows // SF_ROWS, cols // NVFP4_K_ALIGN, SF_TILE_BYTES)
    count = len(records)
    return codes.view(count, slabs, rows, cols // 2), scales.view(count, *tiles)


def expert_matrix(
    record: Record, buffers: Mapping[str, Any], name: str, expert: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one expert's "13" or "2", where its record lies."""
    place = int(buffers["places"][expert])
    codes, scales = record_parts(record, buffers["records"][place : place + 1], name)
    return codes[0], scales[0]


def matrix(shape: Shape, buffers: Buffers, name: str, expert: int) -> Tensor:
    """One expert's w13 or w2 without its global scale: float64 `[N, K]`."""
    codes, scales = expert_matrix(shape.record, buffers, name, expert)
    rows, cols = codes.shape[1], codes.shape[0] * codes.shape[2] * 2
    one = torch.ones(1, device=codes.device)
    return dequantize(Nvfp4Matrix(codes, scales, one, rows, cols)).to(torch.float64)


def shared_operand(shape: Shape, buffers: Mapping[str, Any], name: str) -> Fp8Matrix:
    """The shared expert's w1, w2 or w3."""
    codes = buffers[f"shared_codes{name}"].view(torch.float8_e4m3fn)
    scales = buffers[f"shared_scales{name}"].view(torch.float8_e8m0fnu)
    return Fp8Matrix(codes, scales, codes.shape[1], codes.shape[0] * codes.shape[2])


def operand(shape: Shape, buffers: Mapping[str, Any], name: str, expert: int) -> Nvfp4Matrix:
    """One expert's w13 or w2 as `dsv4.kernels.reference` knows it."""
    codes, scales = expert_matrix(shape.record, buffers, name, expert)
    factors = buffers[f"global_scale{name}"][expert]
    if name == "13":
        return Nvfp4Matrix(codes, scales, factors, 2 * shape.inter, shape.hidden, INTERLEAVE)
    return Nvfp4Matrix(codes, scales, factors, shape.hidden, shape.inter)
