"""Asynchronous copies from global to shared memory.

A slot is a 32-bit number of bytes in shared memory; an address in global memory is a 64-bit number
of bytes, or a pointer. Weights stream through rings of these copies. Plain and `ld.global.nc`
loads, however early they are asked for, are moved next to their use by the assembler: 3 to 5 of 32
stay in flight, and 0.70 of the bandwidth bound is reached where a ring reaches 0.83. Copies keep
tens of kilobytes in flight on a multiprocessor at no cost in registers. Each copy instruction of a
warp touches whole sectors of 32 bytes.

A warp's own ring is shared memory where only the copying thread reads what it copied: a slot is
`pieces` times 16 bytes for each lane, `[piece][lane][16]`, so that a warp reads it without bank
conflicts. A thread waits for its own copies and needs no barrier.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64

from dsv4.kernels.device.asm import at, effect

LANE_BYTES = 16
PIECE_BYTES = 32 * LANE_BYTES


def copy(
    slot: Int32, address: Any, nbytes: int = 16, *, l2: int = 0, to: int = 0, of: int = 0
) -> None:
    """4, 8 or 16 bytes from `address + of` to `slot + to`; 16 go past L1.

    l2: bytes around them that the L2 cache is to fetch, 128 or 256, or 0 for no more than needed.
    """
    effect(f"{_opcode(nbytes, l2)} {at(0, to)}, {at(1, of)}, {nbytes};", slot, address)


def copy_or_zero(
    slot: Int32,
    address: Any,
    live: Int32,
    nbytes: int = 16,
) -> None:
    """8 or 16 bytes; zeros where `live` is 0, and nothing is read."""
    effect(
        "{ .reg .pred p; .reg .u32 n; setp.ne.s32 p, $2, 0; "
        f"selp.u32 n, {nbytes}, 0, p; {_opcode(nbytes)} [$0], [$1], {nbytes}, n; }}",
        slot,
        address,
        live,
    )


def copy_beginning(
    slot: Int32, address: Any, taken: Int32, *, l2: int = 0, to: int = 0, of: int = 0
) -> None:
    """The first `taken` of 16 bytes, zeros for the others."""
    effect(f"{_opcode(16, l2)} {at(0, to)}, {at(1, of)}, 16, $2;", slot, address, taken)


def copy_for_all(slot: Int32, address: Any, condition: Int32) -> None:
    """16 bytes that other warps read too, through L1; nothing where `condition` is 0."""
    effect(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.ca.shared.global [$0], [$1], 16; }",
        slot,
        address,
        condition,
    )


def copy_word_around(slot: Int32, address: Int64, to: int) -> None:
    """4 bytes, the aligned ones that `address` lies in, to `slot + to`."""
    effect(
        f"{{ .reg .b64 a; and.b64 a, $1, -4; {_opcode(4)} {at(0, to)}, [a], 4; }}", slot, address
    )


def commit() -> None:
    """Close a group: all copies since the last one, possibly none."""
    effect("cp.async.commit_group;")


def wait(pending: int) -> None:
    """Until at most `pending` groups are under way."""
    effect(f"cp.async.wait_group {pending};")


def copy_bulk(slot: Int32, address: Any, nbytes: int, barrier: Int32) -> None:
    """Bytes that then count at `barrier` (see `mbarriers`): one thread's business.

    All are multiples of 16.
    """
    effect(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$0], [$1], {nbytes}, [$2];",
        slot,
        address,
        barrier,
    )


def _opcode(nbytes: int, l2: int = 0) -> str:
    through = "cg" if nbytes == LANE_BYTES else "ca"  # only 16 bytes can go past L1
    return f"cp.async.{through}.shared.global" + (f".L2::{l2}B" if l2 else "")
