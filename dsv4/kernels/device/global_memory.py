"""Loads and stores of global memory. An address is a 64-bit number of bytes, or a pointer.

They keep their order among each other. What is constant in an address goes into `offset`: it
becomes part of the instruction and costs no register, which counts where a stack of experts is
larger than 2 GiB and its addresses have 64 bits.
"""

from __future__ import annotations

import enum
from typing import Any

from cutlass import Float32, Int32, Uint32

from dsv4.kernels.device.asm import at, effect, listed, vector


class Load(enum.Enum):
    """How a load goes through the caches."""

    PLAIN = "ld.global"
    ORDERED = "ld.volatile.global"
    """Stays where it is asked for. The assembler moves other loads next to their first use, and
    what should be one wait becomes several."""
    PAST_L1 = "ld.global.cg"
    """For what nobody else on the multiprocessor wants."""
    FRESH = "ld.relaxed.gpu.global"
    """For what another multiprocessor may have written during this launch."""


def load_words(address: Any, count: int, how: Load = Load.ORDERED) -> tuple[Uint32, ...]:
    """1, 2 or 4 words."""
    text = f"{how.value}{vector(count)}.u32 {listed(0, count)}, [${count}];"
    words: tuple[Uint32, ...] = effect(text, address, out=(Uint32,) * count)
    return words


def load_word(address: Any, how: Load = Load.ORDERED) -> Uint32:
    """4 bytes."""
    return load_words(address, 1, how)[0]


def load_floats(address: Any, count: int, how: Load = Load.ORDERED) -> tuple[Float32, ...]:
    """2 or 4 float32."""
    text = f"{how.value}{vector(count)}.f32 {listed(0, count)}, [${count}];"
    numbers: tuple[Float32, ...] = effect(text, address, out=(Float32,) * count)
    return numbers


def load_byte(address: Any) -> Uint32:
    """One byte of what nobody writes during this launch."""
    return Uint32(effect("ld.global.nc.u8 $0, [$1];", address, out=Uint32))


def load_words_if(
    condition: Int32, address: Any, how: Load = Load.PLAIN, offset: int = 0
) -> tuple[Uint32, ...]:
    """4 words, or zeros where `condition` is 0 and nothing is read."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; "
        "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
        f"@p {how.value}.v4.u32 {listed(0, 4)}, {at(5, offset)}; }}"
    )
    words: tuple[Uint32, ...] = effect(text, condition, address, out=(Uint32,) * 4, early=True)
    return words


def load_floats_if(condition: Int32, address: Any) -> tuple[Float32, ...]:
    """4 float32, or zeros where `condition` is 0 and nothing is read."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; "
        "mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; "
        "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; "
        f"@p {Load.ORDERED.value}.v4.f32 {listed(0, 4)}, [$5]; }}"
    )
    found: tuple[Float32, ...] = effect(text, condition, address, out=(Float32,) * 4, early=True)
    return found


def load_channels(pointer: Any, offset: Any, wide: bool) -> tuple[Float32, ...]:
    """Four neighbouring values from `offset` elements on: float32 (`wide`) or bfloat16."""
    address = (pointer + offset).toint()
    if wide:
        return load_floats(address, 4)
    words = load_words(address, 2)
    high = Uint32(0xFFFF0000)
    return tuple(
        bits.bitcast(Float32) for word in words for bits in (word << Uint32(16), word & high)
    )


def store_words(address: Any, words: Any) -> None:
    """1, 2 or 4 words."""
    count = len(words)
    effect(f"st.global{vector(count)}.u32 [$0], {listed(1, count)};", address, *words)


def store_word(address: Any, word: Any) -> None:
    """4 bytes."""
    store_words(address, (word,))


def store_floats(address: Any, values: Any) -> None:
    """2 or 4 float32."""
    count = len(values)
    effect(f"st.global{vector(count)}.f32 [$0], {listed(1, count)};", address, *values)


def store_half(address: Any, word: Uint32) -> None:
    """The lower half of a word."""
    effect("{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.u16 [$0], h; }", address, word)


def store_byte(address: Any, word: Uint32) -> None:
    """The lowest byte of a word."""
    effect("{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.u8 [$0], h; }", address, word)


def prefetch(address: Any) -> None:
    """Ask for a line, into L2. A hint: nothing is read, so nothing can be stale."""
    effect("prefetch.global.L2 [$0];", address)
