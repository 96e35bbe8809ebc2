"""Loads and stores of shared memory, at 32-bit numbers of bytes.

They keep their order among each other. What is constant in an address goes into `offset`.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Uint32

from dsv4.kernels.device.asm import at, effect, listed, vector


def load_words(address: Int32, count: int, offset: int = 0) -> tuple[Uint32, ...]:
    """1, 2 or 4 words."""
    text = f"ld.shared{vector(count)}.u32 {listed(0, count)}, {at(count, offset)};"
    words: tuple[Uint32, ...] = effect(text, address, out=(Uint32,) * count)
    return words


def load_word(address: Int32) -> Uint32:
    """4 bytes."""
    return load_words(address, 1)[0]


def load_floats(address: Int32, count: int) -> tuple[Float32, ...]:
    """1, 2 or 4 float32."""
    text = f"ld.shared{vector(count)}.f32 {listed(0, count)}, [${count}];"
    numbers: tuple[Float32, ...] = effect(text, address, out=(Float32,) * count)
    return numbers


def load_float(address: Int32) -> Float32:
    """One float32."""
    return load_floats(address, 1)[0]


def load_half(address: Int32) -> Uint32:
    """Two bytes."""
    return Uint32(effect("ld.shared.u16 $0, [$1];", address, out=Uint32))


def load_byte(address: Int32) -> Uint32:
    """One byte."""
    return Uint32(effect("ld.shared.u8 $0, [$1];", address, out=Uint32))


def store_words(address: Int32, words: Any, offset: int = 0) -> None:
    """1, 2 or 4 words."""
    count = len(words)
    text = f"st.shared{vector(count)}.u32 {at(0, offset)}, {listed(1, count)};"
    effect(text, address, *words)


def store_word(address: Int32, word: Any) -> None:
    """4 bytes."""
    store_words(address, (word,))


def store_float(address: Int32, value: Float32) -> None:
    """One float32."""
    effect("st.shared.f32 [$0], $1;", address, value)


def store_half(address: Int32, word: Uint32) -> None:
    """The lower half of a word."""
    effect("{ .reg .b16 h; cvt.u16.u32 h, $1; st.shared.b16 [$0], h; }", address, word)


def store_byte(address: Int32, word: Any) -> None:
    """The lowest byte of a word."""
    effect("st.shared.u8 [$0], $1;", address, word)


def store_transposed(address: Int32, words: Any) -> None:
    """Four 8x8 matrices of 16-bit elements, each written transposed.

    Lane `4g + t` holds row g, columns 2t and 2t + 1 of each; lane `8i + c` gives the address of
    column c of matrix i: 16 bytes.
    """
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    effect(text, address, *words)


def clear(address: Int32) -> None:
    """16 zero bytes."""
    effect("{ .reg .u32 z; mov.u32 z, 0; st.shared.v4.u32 [$0], {z, z, z, z}; }", address)


def count(address: Int32) -> None:
    """Add 1 to a word, atomically; lanes of one address go together."""
    effect("red.shared.add.u32 [$0], 1;", address)
