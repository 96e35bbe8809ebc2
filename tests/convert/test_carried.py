"""Values that are carried: what means nothing is refused with its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import dsv4
from dsv4.convert.outputs.verbatim import checked
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import FormatError


@pytest.mark.parametrize(
    ("expert", "said"), [(8, "is 8, expected an entry from 0 to 7"), (-1, "-1")]
)
def test_a_table_names_experts_that_exist(
    expert: int, said: str, tiny_source: Path, tmp_path: Path
) -> None:
    hub = Path(shutil.copytree(tiny_source, tmp_path / "hub"))
    entry = LocalSource(hub).entries["layers.0.ffn.gate.tid2eid"]
    with (hub / entry.file).open("r+b") as file:
        file.seek(entry.begin + 8 * (3 * entry.shape[1] + 1))
        file.write(expert.to_bytes(8, "little", signed=True))
    with pytest.raises(FormatError, match=rf"tid2eid: the value at \[3, 1\] .*{said}"):
        dsv4.convert(hub, tmp_path / "packed")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_every_nan_is_found_and_nothing_else(dtype: torch.dtype) -> None:
    width = dtype.itemsize
    values = 1 << 8 * min(width, 2)
    raw = torch.arange(values, dtype=torch.int64)
    raw = raw << 16 if width == 4 else raw
    every = raw.to({1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]).view(dtype)
    finite = every.to(torch.float32).isfinite()  # torch's own reading of the bytes
    kept = every[finite]
    assert torch.equal(checked(kept, "x").view(torch.uint8), kept.view(torch.uint8))
    assert (~finite).sum() > 0
    for value in every[~finite][:300:7]:
        with pytest.raises(FormatError, match=r"x: the value at \[41\] is (nan|-?inf)"):
            checked(torch.cat([kept[:1], value.reshape(1)]), "x", first_row=40)
