"""Layouts: how quantised matrices are arranged in memory, each with its exact inverse.

Scale tiling (32x4x4, cuBLASLt's and CUTLASS's block-scale order): 128 rows x 4 scale columns make
a tile of 512 bytes, in which row r and column j lie at (r%32)*16 + (r//32)*4 + j; tiles go along K
first. Gate and up rows of a fused SwiGLU alternate in runs of `granularity` rows. A matrix cut
along K is stored as slabs, each a dense matrix of its own. Everything here moves bytes only.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import dequantize_fp8
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    NVFP4_BLOCK,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    Fp8Matrix,
    Matrix,
    Nvfp4Matrix,
)
from dsv4.formats.store.specs import FP8_LAYOUT, NVFP4_LAYOUT, PLAIN_LAYOUT

SF_COLS = NVFP4_K_ALIGN // NVFP4_BLOCK
_SF_INNER_ROWS = 32


def tile_scales(scales: Tensor) -> Tensor:
    """Scale bytes `[..., R, KB]` -> tiles `[..., ceil(R/128), ceil(KB/4), 512]`, zero-padded.

    Source of the order: cutlass `sm100_blockscaled_layout.hpp`.
    """
    *lead, rows, cols = scales.shape
    row_tiles, col_tiles = -(-rows // SF_ROWS), -(-cols // SF_COLS)
    padded = _pad(scales, row_tiles * SF_ROWS - rows, col_tiles * SF_COLS - cols)
    # The four scales of a row move together.
    words = _as_words(padded, torch.int32)
    words = words.view(*lead, row_tiles, SF_COLS, _SF_INNER_ROWS, col_tiles)
    tiles = words.transpose(-1, -3).contiguous().view(torch.uint8)
    return tiles.view(*lead, row_tiles, col_tiles, SF_TILE_BYTES)


def untile_scales(tiled: Tensor, rows: int, kb: int) -> Tensor:
    """Tiles `[..., ceil(rows/128), ceil(kb/4), 512]` -> scale bytes `[..., rows, kb]`."""
    *lead, row_tiles, col_tiles, size = tiled.shape
    expected = (-(-rows // SF_ROWS), -(-kb // SF_COLS), SF_TILE_BYTES)
    if (row_tiles, col_tiles, size) != expected:
        raise FormatError(
            f"tiled scales have shape {tuple(tiled.shape)}, expected {expected} at the end "
            f"for {rows} rows of {kb} scales"
        )
    words = _as_words(tiled, torch.int32).reshape(
        *lead, row_tiles, col_tiles, _SF_INNER_ROWS, SF_COLS
    )
    rowwise = words.transpose(-1, -2).movedim(-3, -1).contiguous().view(torch.uint8)
    padded = rowwise.view(*lead, row_tiles * SF_ROWS, col_tiles * SF_COLS)
    return padded[..., :rows, :kb].contiguous()


def interleave_rows(gate: Tensor, up: Tensor, granularity: int) -> Tensor:
    """Gate and up `[..., I, X]` -> `[..., 2I, X]`: runs of `granularity` rows, gate's first."""
    if gate.shape != up.shape:
        raise FormatError(f"gate has shape {tuple(gate.shape)} but up has {tuple(up.shape)}")
    _require_multiple("rows of gate", gate.shape[-2], granularity)
    *lead, rows, width = gate.shape
    runs = [part.reshape(*lead, rows // granularity, granularity, width) for part in (gate, up)]
    return torch.stack(runs, dim=-3).flatten(-4, -2)


def deinterleave_rows(x: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    """`[..., 2I, X]` -> (gate, up) `[..., I, X]`, the inverse of `interleave_rows`."""
    _require_multiple("interleaved rows", x.shape[-2], 2 * granularity)
    *lead, rows, width = x.shape
    runs = x.reshape(*lead, rows // (2 * granularity), 2, granularity, width)
    gate, up = runs.unbind(dim=-3)
    return gate.flatten(-3, -2), up.flatten(-3, -2)


def pack_nvfp4(parts: Sequence[NVFP4Tensor], *, slabs: int = 1, interleave: int = 0) -> Nvfp4Matrix:
    """Arrange one matrix, or gate and up interleaved by `interleave` rows, as kernels read it.

    One slab is zero-padded to a multiple of 64 columns; several must divide K into such
    multiples. Raises FormatError otherwise, and for parts of different shapes.
    """
    if len(parts) != (2 if interleave else 1):
        raise FormatError(f"{len(parts)} NVFP4 parts with interleave {interleave}, expected 1 or 2")
    shape = parts[0].shape
    if len(shape) != 2 or any(part.shape != shape for part in parts):
        raise FormatError(f"NVFP4 parts have shapes {[p.shape for p in parts]}, expected [N, K]")
    cols = shape[1]
    if slabs > 1:
        _require_multiple(f"columns in {slabs} slabs", cols, slabs * NVFP4_K_ALIGN)
    codes, scales = parts[0].codes, parts[0].scales
    if interleave:
        codes = interleave_rows(codes, parts[1].codes, interleave)
        scales = interleave_rows(scales, parts[1].scales, interleave)
    padded = -(-cols // NVFP4_K_ALIGN) * NVFP4_K_ALIGN
    codes = to_slabs(_pad(codes, 0, padded // 2 - codes.shape[1]), slabs)
    scales = _slabs(_pad(scales, 0, padded // NVFP4_BLOCK - scales.shape[1]), slabs)
    return Nvfp4Matrix(
        codes=codes,
        scales=tile_scales(scales),
        global_scales=torch.stack([part.global_scale for part in parts]),
        rows=codes.shape[1],
        cols=cols,
        interleave=interleave,
    )


def unpack_nvfp4(m: Nvfp4Matrix) -> list[NVFP4Tensor]:
    """The parts given to `pack_nvfp4`, byte for byte."""
    per_slab = m.codes.shape[2] * 2 // NVFP4_BLOCK
    blocks = -(-m.cols // NVFP4_BLOCK)
    codes = _from_slabs(m.codes)[:, : blocks * NVFP4_BLOCK // 2].contiguous()
    scales = _from_slabs(untile_scales(m.scales, m.rows, per_slab))[:, :blocks].contiguous()
    pairs = [(codes, scales)]
    if m.interleave:
        split_codes = deinterleave_rows(codes, m.interleave)
        split_scales = deinterleave_rows(scales, m.interleave)
        pairs = list(zip(split_codes, split_scales, strict=True))
    return [
        NVFP4Tensor(c, s, g, (c.shape[0], m.cols))
        for (c, s), g in zip(pairs, m.global_scales.unbind(), strict=True)
    ]


def pack_fp8(codes: Tensor, scales: Tensor, *, slabs: int = 1) -> Fp8Matrix:
    """Codes float8_e4m3fn `[N, K]` -> slabs `[S, N, K/S]`; scales stay as they are."""
    if codes.dim() != 2:
        raise FormatError(f"FP8 codes have shape {tuple(codes.shape)}, expected [N, K]")
    _require_multiple(f"columns in {slabs} slabs", codes.shape[1], slabs)
    return Fp8Matrix(to_slabs(codes, slabs), scales, codes.shape[0], codes.shape[1])


def unpack_fp8(m: Fp8Matrix) -> tuple[Tensor, Tensor]:
    """The (codes, scales) given to `pack_fp8`, byte for byte."""
    return _from_slabs(m.codes), m.scales


def dequantize(m: Matrix) -> Tensor:
    """Float32 `[rows, cols]` of any weight operand, computed through the inverse layout.

    Rows of an interleaved matrix stay in packed order, each with its projection's global scale.
    """
    if isinstance(m, Nvfp4Matrix):
        values = [dequantize_nvfp4(part) for part in unpack_nvfp4(m)]
        return interleave_rows(values[0], values[1], m.interleave) if m.interleave else values[0]
    if isinstance(m, Fp8Matrix):
        return dequantize_fp8(*unpack_fp8(m))
    return m.to(torch.float32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A registered arrangement: `inverse(forward(x)) == x`, byte for byte."""

    id: str
    forward: Callable[..., Any]
    inverse: Callable[..., Any]
    parameters: Mapping[str, str]


def _keep(x: Tensor) -> Tensor:
    return x


LAYOUTS: Mapping[str, Layout] = types.MappingProxyType(
    {
        layout.id: layout
        for layout in (
            Layout(
                NVFP4_LAYOUT,
                pack_nvfp4,
                unpack_nvfp4,
                {
                    "slabs": "K-slabs, each [N, K/slabs] with its own scale tiles; default 1",
                    "interleave": "rows of gate, then of up, alternating; 0: one projection",
                },
            ),
            Layout(
                FP8_LAYOUT,
                pack_fp8,
                unpack_fp8,
                {"slabs": f"K-slabs, each [N, K/slabs]; scales per {FP8_BLOCK}x{FP8_BLOCK} uncut"},
            ),
            Layout(PLAIN_LAYOUT, _keep, _keep, {}),
        )
    }
)


def _pad(x: Tensor, rows: int, cols: int) -> Tensor:
    """`x` with zeros below and to the right; `x` itself where there is nothing to add."""
    return pad(x, (0, cols, 0, rows)) if rows or cols else x


def _slabs(x: Tensor, slabs: int) -> Tensor:
    """`[N, K]` seen as `[slabs, N, K/slabs]`."""
    return x.reshape(x.shape[0], slabs, x.shape[1] // slabs).transpose(0, 1)


def to_slabs(x: Tensor, slabs: int) -> Tensor:
    """`[N, K]` -> `[S, N, K/S]`, contiguous: each slab a matrix of its own."""
    cut = _slabs(x, slabs)
    if slabs == 1 or x.dtype.itemsize != 1 or x.device.type != "cpu":
        return cut.contiguous()
    # NumPy moves items of any size whole: a run of a row at a time, 1.3 times as fast as torch.
    runs = x.contiguous().view(torch.uint8).numpy().view(f"V{cut.shape[2]}")
    dense = np.ascontiguousarray(runs.T).view(np.uint8)
    return torch.from_numpy(dense).view(x.dtype).view(cut.shape)


def _from_slabs(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _as_words(x: Tensor, word: torch.dtype) -> Tensor:
    """Bytes `x` seen as wider elements along its last dimension, copied first if unaligned."""
    steps = (x.storage_offset(), *x.stride()[:-1])
    if x.stride(-1) != 1 or any(step % word.itemsize for step in steps):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(word)


def _require_multiple(what: str, found: int, divisor: int) -> None:
    if divisor < 1 or found % divisor:
        raise FormatError(f"{what}: {found}, expected a multiple of {divisor}")
