"""Hopper's warpgroup matrix product: four warps, asynchronous, B in shared memory.

A tile is the descriptor that the instruction takes of it.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from dsv4.kernels.device.warpgroup.inline import tied
from dsv4.kernels.device.warpgroup.layout import GROUP_BYTES, MMA_COLS, TILE_ROW_BYTES

# Descriptor: address / 16 in bits 0..13, bytes / 16 between groups of 8 rows in bits 32..45, the
# 128-byte swizzle in bits 62..63.
_SWIZZLED_GROUPS = (1 << 62) | (GROUP_BYTES // 16 << 32)


def tile(address: Int32) -> Int64:
    """Of a tile at this address of shared memory."""
    return _descriptor(address, 1)


def turned_tiles(address: Int32, tile_bytes: int) -> Int64:
    """Of b `[16, n]`: rows of tiles that lie `tile_bytes` apart, each of 64 columns."""
    return _descriptor(address, tile_bytes // 16)


def _descriptor(address: Int32, leading: int) -> Int64:
    start = Int64((Uint32(address) & Uint32(0x3FFFF)) >> 4)
    return start | Int64(_SWIZZLED_GROUPS | (leading << 16))


def columns(tile: Int64, step: int) -> Int64:
    """The descriptor of the tile's columns `16 step`…"""
    return tile + Int64(step * MMA_COLS * 2 // 16)


def rows(tiles: Int64, step: int) -> Int64:
    """The descriptor of the turned tiles' rows `16 step`…"""
    return tiles + Int64(step * MMA_COLS * TILE_ROW_BYTES // 16)


@dsl_user_op
def multiply(
    acc: list[Any],
    a: Any,
    b: Int64,
    turned: bool,
    *,
    loc: Any = None,
    ip: Any = None,
) -> Any:
    """Issue `acc + a · b`. a: four registers, or a descriptor."""
    count = len(acc)
    operands = list(a) if isinstance(a, (tuple, list)) else [a]
    outs = ", ".join(f"${i}" for i in range(count))
    first = 2 * count  # the tied inputs come between
    if len(operands) == 4:
        text_a = "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"
        kinds, flags = ["r"] * 4, f"p, 1, 1, {int(turned)}"
    else:
        text_a, kinds, flags = f"${first}", ["l"], f"p, 1, 1, 0, {int(turned)}"
    text = (
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned"
        f".m64n{2 * count}k16.f32.bf16.bf16 {{{outs}}}, {text_a}, ${first + len(operands)}, "
        f"{flags}; }}"
    )
    return tied(acc, [*operands, b], text, [*kinds, "l"], loc, ip)


@dsl_user_op
def fence(*, loc: Any = None, ip: Any = None) -> None:
    """Before the first product after registers were written."""
    _plain("wgmma.fence.sync.aligned;", loc, ip)


@dsl_user_op
def commit(*, loc: Any = None, ip: Any = None) -> None:
    """The products issued since the last commit are one group."""
    _plain("wgmma.commit_group.sync.aligned;", loc, ip)


@dsl_user_op
def wait(pending: int, *, loc: Any = None, ip: Any = None) -> None:
    """Until at most `pending` of the latest groups are not done."""
    _plain(f"wgmma.wait_group.sync.aligned {pending};", loc, ip)


@dsl_user_op
def wait_for(acc: list[Any], *, loc: Any = None, ip: Any = None) -> Any:
    """Until all is done; -> the sums, which may be read."""
    return tied(acc, [], "wgmma.wait_group.sync.aligned 0;", [], loc, ip)


def _plain(text: str, loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, [], text, "~{memory}", has_side_effects=True, loc=loc, ip=ip)
