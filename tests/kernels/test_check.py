"""The check finds what is wrong with a kernel: run on the CPU with kernels written in torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import KernelError
from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.contract import Case, Expected, Launch
from dsv4.kernels.core.library import Library
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.core.verify import GUARD_BYTES, check, check_alone
from dsv4.kernels.ops.fp4_blackwell import quantize_contract
from dsv4.kernels.ops.xxh3 import contract as xxh3

DOUBLE = kernel(
    "double",
    "dsv4.kernels.ops.gemv.kernel:Gemv",
    {},
    (
        Argument("x", torch.float32, ("n",)),
        Argument("y", torch.float32, ("n",), "out"),
        Argument("count", torch.int32, (1,), "inout"),
    ),
)


def _expect(buffers: dict[str, Any]) -> dict[str, Expected]:
    return {"y": Expected(buffers["x"] * 2), "count": Expected(buffers["count"] + 1)}


CASE = Case(
    "double",
    "test",
    "none",
    1,
    (Launch(DOUBLE),),
    nbytes=0,
    make=lambda rng: {
        "x": torch.randn(16, generator=rng),
        "y": torch.empty(16),
        "count": torch.full((1,), 41, dtype=torch.int32),
    },
    expect=_expect,
)

Work = Callable[[Tensor, Tensor, Tensor], None]


class Fake(Library):
    """Kernels that are functions of torch."""

    def __init__(self, work: Work) -> None:
        self.location, self.work = Path(), work

    def function(self, kernel: Kernel) -> Work:
        return self.work


def _right(x: Tensor, y: Tensor, count: Tensor) -> None:
    y.copy_(x * 2)
    count.add_(1)


def _unwritten(x: Tensor, y: Tensor, count: Tensor) -> None:
    y[:-1] = x[:-1] * 2
    count.add_(1)


def _beside(x: Tensor, y: Tensor, count: Tensor) -> None:
    _right(x, y, count)
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()


def _before(x: Tensor, y: Tensor, count: Tensor) -> None:
    _right(x, y, count)
    y.as_strided((1,), (1,), y.storage_offset() - 1).zero_()


def _ignores_its_input(x: Tensor, y: Tensor, count: Tensor) -> None:
    y.copy_(x * 2)
    count.fill_(1)


def test_a_right_kernel_passes() -> None:
    assert check(CASE, Fake(_right), torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_unwritten, "y: 1 of 16 elements are outside their bound, first at (15,): nan"),
        (_beside, "y: bytes beside it were written"),
        (_before, "y: bytes beside it were written"),
        (_ignores_its_input, "count: 1 of 1 elements"),
    ],
)
def test_a_wrong_kernel_is_caught(work: Work, said: str) -> None:
    (found,) = check(CASE, Fake(work), torch.device("cpu"))
    assert found.startswith(said)


def test_guards_are_wider_than_any_vector_store() -> None:
    assert GUARD_BYTES >= 32 * 16


ROWS = kernel(
    "rows",
    "dsv4.kernels.ops.gemv.kernel:Gemv",
    {},
    (
        Argument("x", torch.float32, ("rows", 4)),
        Argument("y", torch.float32, ("rows", 4), "out"),
        Argument("count", torch.int32, (1,), "inout"),
    ),
)
BATCH = Case(
    "rows",
    "test",
    "none",
    3,
    (Launch(ROWS),),
    nbytes=0,
    make=lambda rng: {
        "x": torch.randn(3, 4, generator=rng),
        "y": torch.empty(3, 4),
        "count": torch.zeros(1, dtype=torch.int32),
    },
    expect=_expect,
)


def _looks_at_the_others(x: Tensor, y: Tensor, count: Tensor) -> None:
    _right(x, y, count)
    y[1:, 2] += x[0, 0] * 2.0**-20


def test_a_token_that_depends_on_those_beside_it_is_caught() -> None:
    assert check_alone(BATCH, Fake(_right), torch.device("cpu")) == []
    assert check_alone(BATCH, Fake(_looks_at_the_others), torch.device("cpu")) == [
        "y: token 1 differs alone and beside the others",
        "y: token 2 differs alone and beside the others",
    ]


def test_tokens_that_share_something_are_not_held_alone() -> None:
    """One scale for all tokens: by definition a token alone has other results."""
    joint = dataclasses.replace(BATCH, joint=True)
    assert check_alone(joint, Fake(_looks_at_the_others), torch.device("cpu")) == []
    for case in quantize_contract.checks(FLASH, "none"):
        config = dict(case.kernels[1].config)
        assert case.joint is (not config["per_row"] or "groups" in config)


def test_a_buffer_with_other_rows_than_the_case_is_not_cut() -> None:
    wide = dataclasses.replace(BATCH, rows=2)
    with pytest.raises(KernelError, match="rows test none rows 2: x has 3 rows, not the case's"):
        check_alone(wide, Fake(_right), torch.device("cpu"))


def test_the_arena_has_no_rows_to_cut() -> None:
    [case] = xxh3.checks(FLASH, "none")
    assert all("rows" not in one.shape for kernel in case.kernels for one in kernel.leaves())
