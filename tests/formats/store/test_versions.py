"""Version 2 is still read; version 3's root commits to contents alone.

The stores of version 2 were written by the dsv4 of that time, their roots printed by it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.formats.errors import StoreError
from dsv4.formats.store.integrity import check_root
from dsv4.formats.store.manifest import origin_of
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import NODE_DOCUMENT
from dsv4.validate.diff import diff
from tests.formats.store import packing
from tests.formats.store.golden import ROOTS, unpack

HUB = {"kind": "hub", "repo": "some-org/some-model", "commit": "c0ffee" + "0" * 34}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """The same source, packed today."""
    dsv4.convert(old / "source", tmp_path / "new")
    return tmp_path / "new"


@pytest.mark.parametrize("kind", ROOTS)
def test_version_2_opens_validates_and_runs(old: Path, kind: str) -> None:
    packed = dsv4.open(old / kind)
    assert check_root(packed.store) == ROOTS[kind]
    assert origin_of(packed.store.manifest) == (HUB if kind == "hub" else {"kind": "local"})
    report = dsv4.validate(old / kind, source=old / "source")
    assert (report.ok, report.root) == (True, ROOTS[kind])
    logits = dsv4.load(old / kind).session(8).forward(torch.tensor([1, 2, 3]))
    assert torch.isfinite(logits).all()


def test_version_2_is_repaired_to_its_own_root(old: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(old / "local", tmp_path / "store"))
    (store / "norm/weight/c/0").unlink()
    (store / "embed/zarr.json").unlink()
    codes = store / "head/codes/c/0/0"
    codes.write_bytes(b"\0" + codes.read_bytes()[1:])
    assert dsv4.repair(store, source=old / "source").ok
    assert packing.tree(store) == packing.tree(old / "local")


def test_version_2_commits_to_its_origin(old: Path, tmp_path: Path) -> None:
    """Which is why two of the same bytes have two roots."""
    assert ROOTS["local"] != ROOTS["hub"]
    store = Path(shutil.copytree(old / "hub", tmp_path / "store"))
    _edit(store, lambda manifest: manifest["source"].update(repo="other/model"))
    with pytest.raises(StoreError, match="the metadata was altered"):
        check_root(PackedStore.open(store))


def test_a_version_cannot_be_taken_for_another(old: Path, new: Path, tmp_path: Path) -> None:
    """The marker and the root pin it, so that nothing that version 2 covers can be left open."""
    for store, version in ((old / "local", 3), (new, 2)):
        copy = Path(shutil.copytree(store, tmp_path / f"as{version}"))
        _edit(copy, lambda manifest, v=version: manifest.update(format_version=v))
        with pytest.raises(StoreError, match=r"two format versions|origin|other members"):
            PackedStore.open(copy)


def test_today_packs_the_same_but_for_the_version(old: Path, new: Path) -> None:
    """Every byte; and the two old stores differ in nothing but where they come from."""
    one, other = dsv4.open(old / "local"), dsv4.open(new)
    assert [(d.kind, d.path) for d in diff(one, other)] == [("section", "format_version")]
    assert diff(one, dsv4.open(old / "hub")) == []
    theirs, ours = packing.tree(old / "local"), packing.tree(new)
    different = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    assert different == {"zarr.json", "dsv4.complete"}


def test_the_root_leaves_the_origin_open_and_nothing_else(new: Path, tmp_path: Path) -> None:
    root = check_root(PackedStore.open(new))
    copy = Path(shutil.copytree(new, tmp_path / "copy"))
    _edit(copy, lambda manifest: manifest.update(origin=HUB))
    assert check_root(PackedStore.open(copy)) == root
    assert dsv4.validate(copy).ok
    raw = (copy / NODE_DOCUMENT).read_bytes()
    (copy / NODE_DOCUMENT).write_bytes(raw.replace(b"some-model", b"other-name"))
    with pytest.raises(StoreError, match="one of them was altered"):  # the marker still notices
        PackedStore.open(copy)
    for name in json.loads(raw)["attributes"]["dsv4"].keys() - {"origin", "root", "files"}:
        again = Path(shutil.copytree(new, tmp_path / name))
        _edit(again, lambda manifest, n=name: manifest.update({n: _other(manifest[n])}))
        with pytest.raises(StoreError):
            check_root(PackedStore.open(again))


def _other(section: Any) -> Any:
    return section | {"x": 1} if isinstance(section, dict) else f"{section}x"


def _edit(store: Path, change: Any) -> None:
    packing.edit_metadata(store, lambda document: change(document["attributes"]["dsv4"]))
