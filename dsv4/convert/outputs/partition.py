"""How a matrix is cut into units of parallelism, so that one artefact serves every topology.

Tensor parallelism cuts column-parallel matrices by output rows and row-parallel ones (`wo_b`,
`w2`) by input columns. Cuts by rows are contiguous in a row-major matrix; cuts by columns are
made contiguous by storing K-slabs (`formats/numeric/operands.py`). Every unit is a multiple of 4096
bytes; where a shape does not allow 8 units it gets fewer, or one.
"""

from __future__ import annotations

import math

from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    INTERLEAVE,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    SLABS,
)
from dsv4.formats.store.specs import ALIGNMENT

MIN_SHARD_BYTES = 1 << 20


def interleave_of(intermediate: int) -> int:
    """Rows of gate, then of up, alternating in w13: the largest power of two <= 8 that divides."""
    return math.gcd(intermediate, INTERLEAVE)


def nvfp4_slabs(rows: int, cols: int) -> int:
    """K-slabs of an NVFP4 `[rows, cols]` matrix cut by columns (whole 64-column scale tiles)."""
    row_tiles = -(-rows // SF_ROWS)
    for degree in _degrees():
        per_slab, rest = divmod(cols, degree)
        if rest or per_slab % NVFP4_K_ALIGN:
            continue
        tiles = row_tiles * (per_slab // NVFP4_K_ALIGN) * SF_TILE_BYTES
        if aligned(rows * per_slab // 2, tiles):
            return degree
    return 1


def nvfp4_row_units(rows: int, cols: int) -> int:
    """Units along the rows of an NVFP4 `[rows, cols]` matrix (whole 128-row scale tiles).

    Where 8 does not divide the tiles (a vocabulary of 1010 tiles), every tile is a unit and
    ranks take runs of unequal length.
    """
    col_tiles = -(-cols // NVFP4_K_ALIGN)
    tile_bytes = (SF_ROWS * col_tiles * NVFP4_K_ALIGN // 2, col_tiles * SF_TILE_BYTES)
    tiles, rest = divmod(rows, SF_ROWS)
    if rest:
        return 1
    for units in (SLABS, tiles):
        if units <= tiles and tiles % units == 0:
            per_unit = tiles // units
            if aligned(*(per_unit * size for size in tile_bytes)):
                return units
    return 1


def fp8_slabs(rows: int, cols: int) -> int:
    """K-slabs of an FP8 `[rows, cols]` matrix cut by columns (whole 128-column blocks)."""
    for degree in _degrees():
        per_slab, rest = divmod(cols, degree)
        if not rest and per_slab % FP8_BLOCK == 0 and aligned(rows * per_slab):
            return degree
    return 1


def row_units(rows: int, row_bytes: int, multiple: int = 1) -> int:
    """Units along the rows of a row-major matrix, each a whole number of `multiple` rows."""
    for degree in _degrees():
        per_unit, rest = divmod(rows, degree)
        if not rest and per_unit % multiple == 0 and aligned(per_unit * row_bytes):
            return degree
    return 1


def expert_shards(experts: int, bytes_per_expert: int) -> int:
    """Files an expert stack is cut into, so that an expert-parallel rank reads whole files."""
    for degree in _degrees():
        if experts % degree == 0 and experts // degree * bytes_per_expert >= MIN_SHARD_BYTES:
            return degree
    return 1


def _degrees() -> tuple[int, ...]:
    return (SLABS, 4, 2)


def aligned(*sizes: int) -> bool:
    """Whether all `sizes` are whole pages, and not 0."""
    return all(size > 0 and size % ALIGNMENT == 0 for size in sizes)
