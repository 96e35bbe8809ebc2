"""How the reference sums, and how it hands results over.

Every sum (matrix product, mean square, softmax, weighted pool) and every transcendental function
runs in FP64 and is rounded once. An FP32 sum depends on its order, and BLAS picks the order by
the number of rows; a vectorised `exp` differs from the scalar one that finishes a short row. A
difference of 1e-7 is enough to flip an expert, an indexed block or an FP8 rounding. Computed
wide, a token's result does not depend on which tokens share its call, so any chunking of a
sequence gives the same logits, and a kernel is compared with the correctly rounded value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

WIDE = torch.float64

# Elements of one temporary: 8 MiB in FP64. The allocator keeps blocks of this size; larger ones it
# gives back to the system and pays for every page again: 64 MiB took 2.2 times the CPU time, for
# a Flash layer decoding on one core of an AMD EPYC.
TEMPORARY_ELEMENTS = 1 << 20


@contextlib.contextmanager
def temporaries(elements: int) -> Iterator[None]:
    """Temporaries of up to `elements` meanwhile: a GPU wants fewer and larger ones."""
    global TEMPORARY_ELEMENTS
    before, TEMPORARY_ELEMENTS = TEMPORARY_ELEMENTS, elements
    try:
        yield
    finally:
        TEMPORARY_ELEMENTS = before


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """`result`, or `out` after `result` was written into it (same shape; cast to its dtype)."""
    return result if out is None else out.copy_(result)


def spans(count: int, elements_each: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut `range(count)` into `(start, stop)` runs whose temporaries stay bounded.

    elements_each: elements of the temporary that one item needs.
    multiple: every run but the last is a multiple of it.
    """
    run = max(TEMPORARY_ELEMENTS // max(elements_each, 1) // multiple, 1) * multiple
    for start in range(0, count, run):
        yield start, min(start + run, count)
