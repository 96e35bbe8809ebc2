"""Activations as the MMAs take them, and products of a slot of weights with them.

A step of 128 columns has four parts of eight columns for each of four lanes, and of eight columns c
the pairs (c, c+4) of c = 0..3 lie together: NVFP4's lane t reads its groups 4t..4t+3, 16 bytes for
two MMAs. FP8's lane t has the groups 2t, 2t+1, 2t+8 and 2t+9; group n lies in part n % 4 at lane
n / 4. In shared memory there are eight tokens; of those that are not there anything may be read:
a column of an MMA stays apart from the others.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4.kernels.sm90 import ptx
from dsv4.kernels.sm90.experts import raw
from dsv4.kernels.sm90.operands import MMAS
from dsv4.kernels.sm90.ring import PIECE_BYTES, commit

GROUP = 8  # columns in 16 bytes
GROUPS = 4  # of a lane in a step
STEP_BYTES = GROUPS * 32 * 16  # activations of eight tokens


@cute.jit
def fetch(x: cute.Tensor, tiles: Int32, threads: int) -> None:
    """Begin to copy all tokens to shared memory, a group of copies."""
    thread, _, _ = cute.arch.thread_idx()
    for group in cutlass.range(thread, x.shape[0] * (x.shape[1] // GROUP), threads, unroll=1):
        at = _group_at(tiles, group, x.shape[1] // GROUP)
        raw.copy_weights(at, 0, x.iterator.toint() + Int64(group) * 16, 0)
    commit()


@cute.jit
def arrange(x: cute.Tensor, tiles: Int32, threads: int) -> None:
    """Put the columns that this thread has copied into their order."""
    thread, _, _ = cute.arch.thread_idx()
    for group in cutlass.range(thread, x.shape[0] * (x.shape[1] // GROUP), threads, unroll=1):
        at = _group_at(tiles, group, x.shape[1] // GROUP)
        w = raw.read_shared(at, 0)
        low = [ptx.byte_permute(w[i], w[i + 2], 0x5410) for i in range(2)]
        high = [ptx.byte_permute(w[i], w[i + 2], 0x7632) for i in range(2)]
        raw.write_shared(at, 0, (low[0], high[0], low[1], high[1]))


@cute.jit
def _group_at(tiles: Int32, group: Int32, per_row: int) -> Int32:
    token, place = group // per_row, group % per_row
    step, t, part = place // 16, place % 16 // 4, place % 4
    return tiles + ((step * GROUPS + part) * 32 + token * 4 + t) * 16


@cute.jit
def column(group: Int32, i: Int32) -> Int32:
    """Where column `i` of a group of eight lies in a row of `h`."""
    step, t, part = group // 16, group % 16 // 4, group % 4
    within = 2 * i if i < 4 else 2 * i - 7
    return ((step * GROUPS + part) * 4 + t) * GROUP + within


@cute.jit
def fp8_place(part_bytes: int) -> Int32:
    """Of a step's activations, where the first of the lane's groups for FP8 begins."""
    t = cute.arch.lane_idx() % 4
    return t % 2 * 2 * part_bytes + t // 2 * 16


def fp8_offset(piece: int, part_bytes: int) -> int:
    """From there to its group `piece`."""
    return piece % 2 * part_bytes + piece // 2 * 32


def read(slot: Int32, pieces: int) -> list[Any]:
    """A slot's words of this lane."""
    words: list[Any] = []
    for piece in range(pieces):
        words.extend(raw.read_shared(slot, piece * PIECE_BYTES))
    return words


def multiply_nvfp4(operand: Any, acc: Any, words: Any, x: Any) -> None:
    """128 columns of 32 rows into `acc`: two tiles of 16 rows, eight MMAs each.

    The tiles take turns: an MMA waits long for the one before it in its chain.
    """
    prepared = operand.prepare(words, cute.arch.lane_idx() % 4)
    sums = [tuple(acc[4 * half + c] for c in range(4)) for half in range(2)]
    for mma in range(MMAS):
        for half in range(2):
            a = operand.a(words, prepared, half, mma)
            sums[half] = ptx.mma_bf16(sums[half], a, (x[2 * mma], x[2 * mma + 1]))
    for half in range(2):
        for c in range(4):
            acc[4 * half + c] = sums[half][c]


def multiply_fp8(operand: Any, words: Any, x: Any, scales: Any) -> list[Float32]:
    """128 columns of 16 rows; scales: of the first eight and the others."""
    sums = tuple(Float32(0.0) for _ in range(4))
    for mma in range(MMAS):
        piece, odd = mma // 4 * 2 + mma % 4 // 2, mma % 2
        half = 0x7632 if odd else 0x5410  # of four columns, i and i + 2 go together
        w = x[4 * piece : 4 * piece + 4]
        b = ptx.byte_permute(w[0], w[2], half), ptx.byte_permute(w[1], w[3], half)
        sums = ptx.mma_bf16(sums, operand.a(words, None, 0, mma), b)
    return [sums[c] * scales[c // 2] for c in range(4)]
