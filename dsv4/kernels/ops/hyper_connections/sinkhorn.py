"""A 4x4 matrix made doubly stochastic by one thread, in registers.

The iteration divides rows and columns in turn by their sums plus eps. Written for the divisors of
the matrix instead of the matrix itself: with `comb = K / (rows ⊗ cols)`,

    rows_i <- Σ_j K_ij / cols_j + eps rows_i,      cols_j <- Σ_i K_ij / rows_i + eps cols_j

Four reciprocals are one: 1/a = (bcd)/(abcd), and the quotient waits for nothing but its sum.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, cute, range_constexpr

SIZE = 4


def quotients(divisors: Any) -> tuple[list[Float32], Float32]:
    """-> (numerators, factor): `1 / divisors[i]` is `numerators[i] * factor`."""
    a, b, c, d = (divisors[n] for n in range(SIZE))
    ab, cd = a * b, c * d
    return [b * cd, a * cd, d * ab, c * ab], cute.arch.rcp_approx(ab * cd)


def _step(own: Any, other: Any, weights: Any, eps: float) -> None:
    """Divisors `own` from `other`; weights: per own one, the four of its sum."""
    numerators, factor = quotients(other)
    totals = [weights[i][0] * numerators[0] for i in range(SIZE)]
    for j in range(1, SIZE):  # four chains in turn: none waits for itself
        totals = [cute.math.fma(weights[i][j], numerators[j], totals[i]) for i in range(SIZE)]
    for i in range(SIZE):
        own[i] = cute.math.fma(totals[i], factor, own[i] * Float32(eps))


@cute.jit
def sinkhorn(matrix: Any, iterations: cutlass.Constexpr, eps: cutlass.Constexpr) -> Any:
    """matrix: 4 rows of 4, the softmax of its rows plus eps. -> the same after `iterations`.

    The first round is of columns only.
    """
    columns = [[matrix[i][j] for i in range(SIZE)] for j in range(SIZE)]
    rows = cute.make_rmem_tensor(SIZE, Float32)
    cols = cute.make_rmem_tensor(SIZE, Float32)
    for j in range_constexpr(SIZE):
        a, b, c, d = columns[j]
        rows[j], cols[j] = Float32(1.0), (a + b) + (c + d) + Float32(eps)
    for _ in cutlass.range(iterations - 1, unroll=1):
        _step(rows, cols, matrix, eps)
        _step(cols, rows, columns, eps)
    by_row, row_factor = quotients(rows)
    by_col, col_factor = quotients(cols)
    return [
        [matrix[i][j] * (by_row[i] * row_factor) * (by_col[j] * col_factor) for j in range(SIZE)]
        for i in range(SIZE)
    ]
