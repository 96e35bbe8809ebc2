"""Operands in shared memory: tiles `[rows][64 columns]` of bfloat16, swizzled.

A row has 128 bytes; its 16-byte chunk `c` lies in row `r` at place `c ^ (r % 8)`. A tile begins at
a multiple of 1024 bytes.
"""

from __future__ import annotations

TILE_COLS = 64
TILE_ROW_BYTES = 128
GROUP_BYTES = 8 * TILE_ROW_BYTES  # rows after which the swizzle repeats
MMA_COLS = 16  # that one product sums over
