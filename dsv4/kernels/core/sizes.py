"""Sizes that contracts and kernels share: what a GPU has, and how the work is cut.

This module imports nothing: kernels are built again when a module of this package that they reach
changes (`signature`), and they reach this one. What `dsv4.formats` says too, a test holds equal.
"""

MULTIPROCESSORS = 132
"""Of an H100 or an H200."""
BLACKWELL_MULTIPROCESSORS = 148
"""Of a B200."""
SHARED_BYTES = 227 << 10
"""Of shared memory that a CTA can have, on both."""

STEP_ROWS = 8
"""Tokens of a step, at most: the columns of an `mma.m16n8k16`."""
STEP_COLUMNS = 128
"""Of a weight, that a warp of a step takes at once."""

MAX_EXPERTS = 512
"""Of a layer: the router has a thread for each."""
MAX_TOP_K = 16
"""Experts of a token: tables in shared memory hold the choices of a whole step."""

SCALE_TILE_ROWS = 128
"""Rows of a weight whose NVFP4 scales lie together, in a tile (32x4x4, `dsv4.formats.layouts`)."""
SCALE_TILE_COLUMNS = 64
"""Columns of a weight likewise: four blocks of 16."""
SCALE_TILE_BYTES = 512
