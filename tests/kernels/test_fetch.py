"""Cold experts come to the GPU, whole and where the table says; planted faults are caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.experts import fetch_contract as operation
from dsv4.kernels.ops.experts.contract import Shape
from dsv4.kernels.ops.experts.fetch_contract import Placed, case, cases, checks
from tests.support.interpreter.alterations import without
from tests.support.interpreter.run import configured, faults
from tests.support.machine_code import machine_code

SMALL = Shape(1024, 1024, experts=6, top_k=2, limit=10.0)
PLACED = Placed(2, 6, 2, 5)
CHOICES = torch.tensor([[4, 0], [1, 4], [-1, 5], [6, 1 << 30]])


def test_only_what_is_absent_is_fetched_when_interpreted() -> None:
    """Two of four choices are cold, one of them twice; some are not experts."""
    one = configured(case(SMALL, "none", PLACED, CHOICES, "some"), ctas=3)
    assert faults(one, "sm_90a") == []


def test_what_is_cached_is_kept_and_the_oldest_goes_when_interpreted() -> None:
    """Four of five spare records hold experts of the layer; 2 is absent, 5 and 3 are wanted."""
    choices = torch.tensor([[2, 5], [3, 0]])
    one = configured(case(SMALL, "none", PLACED, choices, "cached", cached=4), ctas=2)
    buffers = one.make(torch.Generator().manual_seed(0))
    held = [int(buffers["table"][6 + e]) for e in (2, 3, 4, 5)]
    assert held == [4, 5, 6, 7]  # all four of the layer's
    assert faults(dataclasses.replace(one), "sm_90a") == []
    full = Placed(2, 6, 2, 3)
    three = configured(case(SMALL, "none", full, choices, "full", cached=3), ctas=2)
    buffers = three.make(torch.Generator().manual_seed(0))
    assert int(buffers["table"][6 + 2]) == -1 and min(buffers["owners"].tolist()) >= 0
    after = operation.run(6, buffers)
    assert int(after["table"][6 + 4]) == -1, "the one that nobody wanted"
    assert faults(three, "sm_90a") == []


@pytest.mark.parametrize("what", ["two records swapped", "a range off by one", "absent", "clock"])
def test_a_planted_fault_is_caught(what: str) -> None:
    one = configured(case(SMALL, "none", PLACED, CHOICES[:2], what), ctas=1)

    def make(rng: torch.Generator) -> Buffers:
        buffers = one.make(rng)
        right.update({name: b.clone() for name, b in buffers.items() if hasattr(b, "clone")})
        if what == "two records swapped":
            first, second = (int(buffers["cold"][6 + e]) for e in (4, 5))
            buffers["host_records"][[first, second]] = buffers["host_records"][[second, first]]
        elif what == "a range off by one":
            buffers["host_records"] = buffers["host_records"].view(-1)[1:]
        elif what == "absent":
            buffers["table"][6 + 4] = 0
        else:
            buffers["state"][0] += 1
        return buffers

    right: Buffers = {}

    def expect(buffers: Buffers) -> object:
        wanted = {**buffers, **right}
        wanted["host"] = torch.tensor([right["host_records"].data_ptr()])
        return operation.expect(PLACED.experts, wanted)

    wrong = dataclasses.replace(one, make=make, expect=expect)  # type: ignore[arg-type]
    assert faults(wrong, "sm_90a") != []


def test_a_kernel_that_copies_less_is_caught() -> None:
    one = configured(case(SMALL, "none", PLACED, CHOICES[:2], "less"), ctas=1)
    assert faults(one, "sm_90a", alter=without(r"st\.global\.v4\.u32[^;]*;", 3)) != []


def test_too_few_spare_records_are_noticed() -> None:
    few = case(SMALL, "none", Placed(1, 6, 0, 1), CHOICES[:2], "few")
    with pytest.raises(ValueError, match="1 spare records"):
        operation.run(6, few.make(torch.Generator()))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_machine_code(arch: str) -> None:
    shape = Shape.of(FLASH)
    code = machine_code(operation.fetch(shape.record.nbytes, shape.experts), arch)
    assert code.ptx.count("ld.global.cg.v4.u32") >= 8
    assert code.spilled == 0


def test_cases_count_what_crosses_the_bus() -> None:
    (none,) = cases(FLASH, "flash", (1,))
    one, every, _ = checks(FLASH, "flash")
    record = Shape.of(FLASH).record.nbytes
    assert record == 14_155_776
    assert (none.nbytes, one.nbytes, every.nbytes) == (0, record, 48 * record)
