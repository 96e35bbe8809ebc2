"""A warp's matrix product."""

from __future__ import annotations

from cutlass import Float32, Uint32

from dsv4.kernels.device.asm import compute

MMA_BF16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def mma_bf16(
    acc: tuple[Float32, Float32, Float32, Float32],
    a: tuple[Uint32, Uint32, Uint32, Uint32],
    b: tuple[Uint32, Uint32],
) -> tuple[Float32, ...]:
    """`acc + a b` of a warp: a `[16, 16]`, b `[16, 8]` bfloat16, acc `[16, 8]` float32.

    Lane `4g + t` holds of a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (and the next
    one); of b: column g at rows 2t and 2t+8; of acc: row g at columns 2t and 2t+1, then row g+8.
    """
    text = f"{MMA_BF16} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    sums: tuple[Float32, ...] = compute(text, *a, *b, *acc, out=(Float32,) * 4)
    return sums
