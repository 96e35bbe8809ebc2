"""Every kind of damage is noticed before use."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.formats.errors import NoStoreError, StoreError
from dsv4.formats.store.damage import Damage
from dsv4.formats.store.integrity import check_root, damage, verify
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL, LOCK, MARKER
from tests.formats.store import packing

CODES = "layers/0/ffn/experts/w2/codes/c/1/0/0"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reader") / "packed"
    packing.write(out)
    return out


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "packed"))


def _flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


def _replace_by_link(path: Path) -> None:
    elsewhere = path.parents[1] / f"{path.name}.elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unfinish(store: Path) -> None:
    (store / MARKER).unlink()
    (store / JOURNAL).write_text("")


REFUSED_AT_OPEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing chunk file": (f"{CODES}: .*missing", lambda s: (s / CODES).unlink()),
    "missing directory": (r"norm/weight/c/0: .*missing", lambda s: shutil.rmtree(s / "norm")),
    "short file": (f"{CODES}: .*bytes, expected", lambda s: os.truncate(s / CODES, 4096)),
    "long file": (
        f"{CODES}: .*bytes, expected",
        lambda s: (s / CODES).write_bytes((s / CODES).read_bytes() + b"\0"),
    ),
    "empty file": (f"{CODES}: .*0 bytes", lambda s: (s / CODES).write_bytes(b"")),
    "file became a directory": ("not a regular file", lambda s: _replace_by_directory(s / CODES)),
    "file became a link": ("is a link.*cp -rL", lambda s: _replace_by_link(s / CODES)),
    "missing asset": ("assets/LICENSE: .*missing", lambda s: (s / "assets/LICENSE").unlink()),
    "missing marker": ("complete is missing.*again", lambda s: (s / MARKER).unlink()),
    "unfinished": ("unfinished.*again", _unfinish),
    "missing metadata": (r"zarr\.json cannot be read", lambda s: (s / "zarr.json").unlink()),
    "altered metadata": ("altered", lambda s: _flip(s / "zarr.json", 500)),
    "metadata is a link": ("is a link.*cp -rL", lambda s: _replace_by_link(s / "zarr.json")),
}


@pytest.mark.parametrize("case", REFUSED_AT_OPEN)
def test_refused_at_open(store: Path, case: str) -> None:
    pattern, harm = REFUSED_AT_OPEN[case]
    harm(store)
    with pytest.raises(StoreError, match=pattern) as caught:
        PackedStore.open(store)
    assert str(caught.value).startswith(f"{store}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_store_at_all_is_told_apart(store: Path, tmp_path: Path) -> None:
    """Each answer says what was given, so that the next command can be right."""
    (tmp_path / "file").write_text("x")
    for name in ("empty", "one shard", "whole"):
        (tmp_path / name).mkdir()
    (tmp_path / "one shard/model.safetensors").write_bytes(b"")
    (tmp_path / "whole/config.json").write_text("{}")
    answers = {
        "nosuch": f"there is no directory {tmp_path}/nosuch",
        "file": f"{tmp_path}/file is a file; give the directory",
        "empty": f"{tmp_path}/empty is not a packed checkpoint",
        "one shard": f"not packed; pack it first: dsv4 convert --hf '{tmp_path}/one shard' --out",
        "whole": f"not packed; pack it first: dsv4 convert --hf {tmp_path}/whole --out",
    }
    for name, answer in answers.items():
        with pytest.raises(NoStoreError, match=re.escape(answer)):
            PackedStore.open(tmp_path / name)
    (store / MARKER).unlink()
    with pytest.raises(StoreError) as caught:
        PackedStore.open(store)
    assert not isinstance(caught.value, NoStoreError)  # damage, which a report is made of


MARKERS = {
    "other root": {"root": "0" * 64},
    "no root": {"root": None},
    "short root": {"root": "ab"},
    "shouted root": {"root": "A" * 64},
    "later version": {"format_version": 4},
    "earlier version": {"format_version": 2},
    "true version": {"format_version": True},
    "text version": {"format_version": "3"},
    "other metadata": {"metadata_sha256": "0" * 64},
}


@pytest.mark.parametrize("case", MARKERS)
def test_an_edited_marker_is_refused(store: Path, case: str) -> None:
    marker = json.loads((store / MARKER).read_text())
    (store / MARKER).write_text(json.dumps(marker | MARKERS[case]))
    with pytest.raises(StoreError, match=r"altered|malformed|format version|two format"):
        PackedStore.open(store)


def test_an_older_store_is_refused_with_what_to_do(store: Path) -> None:
    """Version 1 had SHA-256 where this one has BLAKE3."""
    marker = json.loads((store / MARKER).read_text())
    (store / MARKER).write_text(json.dumps(marker | {"format_version": 1}))
    with pytest.raises(StoreError) as caught:
        PackedStore.open(store)
    assert str(caught.value) == (
        f"{store}: the store has format version 1, this dsv4 reads versions 2 and 3; convert the "
        "source again or use the dsv4 that wrote it"
    )


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}" * 40000, b"NaN"])
def test_a_malformed_marker_is_refused(store: Path, raw: bytes) -> None:
    (store / MARKER).write_bytes(raw)
    with pytest.raises(StoreError, match=re.escape(MARKER) + "|format version"):
        PackedStore.open(store)


def test_an_altered_chunk_is_refused_when_it_is_used(store: Path) -> None:
    spec = next(s for s in packing.sample().arrays if s.path.endswith("w2/codes"))
    _flip(store / CODES, 3 * spec.chunk_nbytes + 17)  # second expert of the file: expert 3
    opened = PackedStore.open(store)
    experts = opened.experts(packing.STACK)
    for expert in range(3):
        experts.w2(expert)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{CODES}: chunk 3 .*does not match"):
            experts.w2(3)
    with pytest.raises(StoreError, match="chunk 3"):
        opened.array(spec.path).tensor()
    assert list(damage(opened)) == [Damage(CODES, 3, "the bytes do not match the checksum")]
    for path in (None, spec.path, "layers/0", CODES):
        with pytest.raises(StoreError, match=f"{CODES}, chunk 3"):
            verify(opened, path)
    verify(opened, "layers/0/ffn/experts/w13")
    unchecked = PackedStore.open(store, verify=False)
    unchecked.experts(packing.STACK).w2(3)


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_anywhere_is_found(store: Path, bit: int) -> None:
    """One byte of every file in turn, its index included: each is found by verify."""
    opened = PackedStore.open(store)
    for file in opened.files_under(None):
        if not file.nbytes:
            continue
        path = store / file.key
        original = path.read_bytes()
        for offset in (0, file.nbytes - 1, file.nbytes * bit // 8):
            raw = bytearray(original)
            raw[offset] ^= 1 << bit
            path.write_bytes(raw)
            assert [d.key for d in damage(PackedStore.open(store), file.key)] == [file.key]
        path.write_bytes(original)
    verify(opened)


def test_a_swap_of_two_files_is_found(store: Path) -> None:
    other = CODES.replace("c/1", "c/0")
    (store / CODES).rename(store / "x")
    (store / other).rename(store / CODES)
    (store / "x").rename(store / other)
    keys = {fault.key for fault in damage(PackedStore.open(store))}
    assert keys == {CODES, other}


def test_unlisted_files_and_altered_nodes_are_found(store: Path) -> None:
    stray = store / "layers/0/ffn/experts/w2/codes/c/2/0"
    stray.mkdir(parents=True)
    (stray / "0").write_bytes(b"x")
    (store / JOURNAL).write_bytes(b"")  # a crash between marker and cleaning up
    (store / LOCK).write_bytes(b"")
    node = store / "head/zarr.json"
    node.write_text(node.read_text().replace("nvfp4", "nvfp5"))
    (store / "norm/zarr.json").unlink()
    opened = PackedStore.open(store)
    assert {fault.key for fault in damage(opened)} == {
        "layers/0/ffn/experts/w2/codes/c/2/0/0",
        "head/zarr.json",
        "norm/zarr.json",
    }
    with pytest.raises(StoreError, match=f"`dsv4 repair {store} --source SRC`"):
        verify(opened)


def test_directories_behind_links_are_refused(store: Path) -> None:
    """The sizes fit, so it is the first use that refuses to leave the store."""
    shutil.move(store / "layers", store.parent / "layers")
    (store / "layers").symlink_to(store.parent / "layers")
    opened = PackedStore.open(store)
    with pytest.raises(StoreError, match="layers is a symbolic link"):
        opened.experts(packing.STACK).w2(0)
    assert any(fault.key == CODES for fault in damage(opened))


def test_a_file_truncated_after_opening_is_refused(store: Path) -> None:
    """A mapping beyond the end would kill the process with SIGBUS."""
    opened = PackedStore.open(store)
    os.truncate(store / CODES, 4096)
    with pytest.raises(StoreError, match="changed since"):
        opened.experts(packing.STACK).w2(3)


def test_sizes_can_be_left_unchecked_for_repair(store: Path) -> None:
    (store / CODES).unlink()
    opened = PackedStore.open(store, check_files=False)
    assert [(f.key, f.problem) for f in damage(opened)] == [(CODES, "the file is missing")]


def test_a_false_root_is_found(store: Path) -> None:
    """Consistent forgery of metadata and marker hash: only the root gives it away."""

    def forge(document: dict[str, dict[str, dict[str, object]]]) -> None:
        document["attributes"]["dsv4"]["tool"] = "another"

    packing.edit_metadata(store, forge)
    opened = PackedStore.open(store)
    with pytest.raises(StoreError, match="the metadata was altered"):
        check_root(opened)
