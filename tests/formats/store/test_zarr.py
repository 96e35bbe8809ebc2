"""zarr-python, which wrote none of the data, reads every array as it was meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ELEMENTS
from tests.formats.store import packing


def _own(node: Any) -> dict[str, Any]:
    """The `dsv4` attribute of a zarr-python node."""
    return dict(node.attrs["dsv4"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zarr") / "packed"
    packing.write(out)
    return out


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.filterwarnings("ignore:Object at:zarr.errors.ZarrUserWarning")
def test_every_array_reads_as_it_was_written(store: Path, consolidated: bool) -> None:
    group = zarr.open_group(store, mode="r", use_consolidated=consolidated)
    what = packing.sample()
    nodes = dict(group.members(max_depth=None))
    arrays = {path: node for path, node in nodes.items() if isinstance(node, zarr.Array)}
    assert sorted(arrays) == sorted(spec.path for spec in what.arrays)
    for spec in what.arrays:
        array = arrays[spec.path]
        assert array.dtype == ELEMENTS[spec.element].zarr
        assert _own(array)["element"] == spec.element
        values = np.asarray(array[...])
        assert np.array_equal(values.view(what.logical[spec.path].dtype), what.logical[spec.path])


def test_group_attributes_are_kept(store: Path) -> None:
    group = zarr.open_group(store, mode="r")
    for path, attributes in packing.sample().groups.items():
        assert dict(group[path].attrs) == attributes
    assert _own(group)["format_version"] == 3
    assert len(_own(group)["root"]) == 64


def test_opening_gives_no_warning(store: Path) -> None:
    script = "import sys, zarr; print(len(dict(zarr.open_group(sys.argv[1]).members(None))))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(store)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    opened = PackedStore.open(store)
    assert int(run.stdout) == len(opened.hierarchy.arrays) + len(opened.hierarchy.groups)


def test_zarr_checks_the_sharding_index(store: Path, tmp_path: Path) -> None:
    """The index is read, not ignored: with a wrong crc32c zarr-python refuses the array."""
    key = "embed/weight/c/0/0"
    original = (store / key).read_bytes()
    try:
        (store / key).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_group(store, mode="r")["embed/weight"][...]  # type: ignore[index]
    finally:
        (store / key).write_bytes(original)


def test_metadata_is_plain_zarr_v3(store: Path) -> None:
    """As the specification names things, independent of the library that wrote them."""
    document = json.loads((store / "embed/weight/zarr.json").read_text())
    assert document["zarr_format"] == 3
    assert document["chunk_key_encoding"]["name"] == "default"
    (codec,) = document["codecs"]
    assert codec["name"] == "sharding_indexed"
    assert codec["configuration"]["index_location"] == "end"
    assert [c["name"] for c in codec["configuration"]["codecs"]] == ["bytes"]
