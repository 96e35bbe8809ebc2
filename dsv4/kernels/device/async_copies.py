"""Loads, stores and asynchronous copies of vectors.

Addresses in global memory are 64-bit numbers of bytes (`pointer.toint()`), those in shared memory
32-bit ones. Loads from global memory are volatile only to keep their order: the assembler moves
others next to their first use, and what should be one wait becomes several.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

_FOUR_FLOATS = "!llvm.struct<(f32, f32, f32, f32)>"
_TWO_FLOATS = "!llvm.struct<(f32, f32)>"
_TWO_WORDS = "!llvm.struct<(i32, i32)>"
_FOUR_WORDS = "!llvm.struct<(i32, i32, i32, i32)>"


def _effect(result: Any, text: str, constraints: str, args: list[Any], loc: Any, ip: Any) -> Any:
    values = [arg.ir_value(loc=loc, ip=ip) for arg in args]
    return llvm.inline_asm(result, values, text, constraints, has_side_effects=True, loc=loc, ip=ip)


def _parts(packed: Any, kind: Any, count: int, loc: Any, ip: Any) -> tuple[Any, ...]:
    return tuple(
        kind(llvm.extractvalue(kind.mlir_type, packed, [n], loc=loc, ip=ip)) for n in range(count)
    )


@dsl_user_op
def load_f32x4(address: Int64, *, loc: Any = None, ip: Any = None) -> tuple[Float32, ...]:
    """Four float32 from global memory."""
    text, out = "ld.volatile.global.v4.f32 {$0, $1, $2, $3}, [$4];", ir.Type.parse(_FOUR_FLOATS)
    return _parts(_effect(out, text, "=f,=f,=f,=f,l", [address], loc, ip), Float32, 4, loc, ip)


@dsl_user_op
def load_f32x4_if(
    condition: Int32, address: Int64, *, loc: Any = None, ip: Any = None
) -> tuple[Float32, ...]:
    """Four float32, or zeros where `condition` is 0 and nothing is read."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; "
        "mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; "
        "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; "
        "@p ld.volatile.global.v4.f32 {$0, $1, $2, $3}, [$5]; }"
    )
    out = _effect(
        ir.Type.parse(_FOUR_FLOATS), text, "=&f,=&f,=&f,=&f,r,l", [condition, address], loc, ip
    )
    return _parts(out, Float32, 4, loc, ip)


@dsl_user_op
def load_f32x2(address: Int64, *, loc: Any = None, ip: Any = None) -> tuple[Float32, ...]:
    """Two float32 from global memory."""
    text, out = "ld.volatile.global.v2.f32 {$0, $1}, [$2];", ir.Type.parse(_TWO_FLOATS)
    return _parts(_effect(out, text, "=f,=f,l", [address], loc, ip), Float32, 2, loc, ip)


@dsl_user_op
def load_b64(address: Int64, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """8 bytes from global memory, as two words."""
    text, out = "ld.volatile.global.v2.u32 {$0, $1}, [$2];", ir.Type.parse(_TWO_WORDS)
    return _parts(_effect(out, text, "=r,=r,l", [address], loc, ip), Uint32, 2, loc, ip)


def load_channels(pointer: Any, offset: Any, wide: bool) -> tuple[Float32, ...]:
    """Four neighbouring values from `offset` elements on: float32 (`wide`) or bfloat16."""
    address = (pointer + offset).toint()
    if wide:
        return load_f32x4(address)
    words = load_b64(address)
    high = Uint32(0xFFFF0000)
    return tuple(
        bits.bitcast(Float32) for word in words for bits in (word << Uint32(16), word & high)
    )


@dsl_user_op
def load_b32(address: Int64, *, loc: Any = None, ip: Any = None) -> Uint32:
    """4 bytes from global memory."""
    return Uint32(_effect(T.i32(), "ld.volatile.global.u32 $0, [$1];", "=r,l", [address], loc, ip))


@dsl_user_op
def store_f32x4(
    address: Int64, values: tuple[Any, ...], *, loc: Any = None, ip: Any = None
) -> None:
    """Four float32 to global memory."""
    _effect(
        None, "st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", [address, *values], loc, ip
    )


@dsl_user_op
def store_b64(address: Int64, words: tuple[Any, ...], *, loc: Any = None, ip: Any = None) -> None:
    """Two words to global memory."""
    _effect(None, "st.global.v2.u32 [$0], {$1, $2};", "l,r,r", [address, *words], loc, ip)


@dsl_user_op
def store_b32(address: Int64, word: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """A word to global memory."""
    _effect(None, "st.global.u32 [$0], $1;", "l,r", [address, word], loc, ip)


@dsl_user_op
def store_b16(address: Int64, word: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """The lower half of a word to global memory."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.u16 [$0], h; }"
    _effect(None, text, "l,r", [address, word], loc, ip)


@dsl_user_op
def store_b8(address: Int64, word: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """The lowest byte of a word to global memory."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.u8 [$0], h; }"
    _effect(None, text, "l,r", [address, word], loc, ip)


@dsl_user_op
def prefetch_l2(address: Int64, *, loc: Any = None, ip: Any = None) -> None:
    """Ask for a line of global memory. A hint: nothing is read, so nothing can be stale."""
    _effect(None, "prefetch.global.L2 [$0];", "l", [address], loc, ip)


@dsl_user_op
def store_shared_b128(
    address: Int32, words: tuple[Any, ...], *, loc: Any = None, ip: Any = None
) -> None:
    """Four words to shared memory."""
    text = "st.shared.v4.u32 [$0], {$1, $2, $3, $4};"
    _effect(None, text, "r,r,r,r,r", [address, *words], loc, ip)


@dsl_user_op
def store_shared_b32(address: Int32, word: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """A word to shared memory."""
    _effect(None, "st.shared.u32 [$0], $1;", "r,r", [address, word], loc, ip)


@dsl_user_op
def load_shared_b128(address: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """Four words from shared memory."""
    text, out = "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", ir.Type.parse(_FOUR_WORDS)
    return _parts(_effect(out, text, "=r,=r,=r,=r,r", [address], loc, ip), Uint32, 4, loc, ip)


@dsl_user_op
def load_shared_f32x4(address: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Float32, ...]:
    """Four float32 from shared memory."""
    text, out = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", ir.Type.parse(_FOUR_FLOATS)
    return _parts(_effect(out, text, "=f,=f,=f,=f,r", [address], loc, ip), Float32, 4, loc, ip)


@dsl_user_op
def load_shared_f32x2(address: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Float32, ...]:
    """Two float32 from shared memory."""
    text, out = "ld.shared.v2.f32 {$0, $1}, [$2];", ir.Type.parse(_TWO_FLOATS)
    return _parts(_effect(out, text, "=f,=f,r", [address], loc, ip), Float32, 2, loc, ip)


@dsl_user_op
def load_shared_f32(address: Int32, *, loc: Any = None, ip: Any = None) -> Float32:
    """A float32 from shared memory."""
    return Float32(_effect(T.f32(), "ld.shared.f32 $0, [$1];", "=f,r", [address], loc, ip))


@dsl_user_op
def copy_word(slot: Int32, address: Int64, *, loc: Any = None, ip: Any = None) -> None:
    """Asynchronous copy of 4 bytes to shared memory at byte `slot` (see `ring`)."""
    _effect(None, "cp.async.ca.shared.global [$0], [$1], 4;", "r,l", [slot, address], loc, ip)


@dsl_user_op
def copy_b128(slot: Int32, address: Int64, *, loc: Any = None, ip: Any = None) -> None:
    """Asynchronous copy of 16 bytes, past L1, to shared memory at byte `slot`."""
    _effect(None, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l", [slot, address], loc, ip)


@dsl_user_op
def copy_b128_or_zero(
    slot: Int32, address: Int64, condition: Int32, *, loc: Any = None, ip: Any = None
) -> None:
    """The same, or 16 zero bytes where `condition` is 0 and nothing is read."""
    text = "{ .reg .u32 n; shl.b32 n, $2, 4; cp.async.cg.shared.global [$0], [$1], 16, n; }"
    _effect(None, text, "r,l,r", [slot, address, condition], loc, ip)


@dsl_user_op
def load_shared_b32(address: Int32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """A word from shared memory."""
    return Uint32(_effect(T.i32(), "ld.shared.u32 $0, [$1];", "=r,r", [address], loc, ip))


@dsl_user_op
def count_shared(address: Int32, *, loc: Any = None, ip: Any = None) -> None:
    """Add 1 to a word of shared memory, atomically; lanes of one address go together."""
    _effect(None, "red.shared.add.u32 [$0], 1;", "r", [address], loc, ip)
