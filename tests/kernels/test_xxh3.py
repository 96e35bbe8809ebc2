"""Checksums on the device are those of the xxHash library."""

from __future__ import annotations

import pytest
import torch
import xxhash

from dsv4.formats.model.releases import FLASH
from dsv4.kernels.ops.xxh3.contract import case, checks
from dsv4.kernels.reference.xxh3 import accumulators, digests
from tests.support.interpreter.run import faults


@pytest.mark.parametrize("nbytes", [1024, 2048, 4096, 65536, 66560])
def test_reference_is_xxhash(nbytes: int) -> None:
    data = torch.randint(256, (5, nbytes), dtype=torch.uint8)
    data[3], data[4] = 0, 255
    found = digests(accumulators(data), torch.full((5,), nbytes))
    assert [int(d) % 2**64 for d in found] == [xxhash.xxh3_64_intdigest(d.numpy()) for d in data]


def test_other_lengths_are_refused() -> None:
    for nbytes in (0, 1000):
        with pytest.raises(ValueError, match="multiple of 1024"):
            accumulators(torch.zeros(1, nbytes, dtype=torch.uint8))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_kernel(arch: str) -> None:
    """On the chunks that the operation's own checks have."""
    [one] = checks(FLASH, "none")
    assert faults(one, arch) == []


def test_cases_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 1024"):
        case([1000], "odd", "none")
