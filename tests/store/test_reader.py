"""Tensors as they were written, without copies; every kind of damage noticed before use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.matrices import Fp8Matrix, Nvfp4Matrix
from dsv4.formats.store.integrity import Damage, check_root, damage
from dsv4.formats.store.mapped import StoredArray
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.schema import ELEMENTS, JOURNAL, LOCK, MARKER, ArraySpec
from dsv4.formats.store.writer import StoreWriter
from tests.store import packing

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


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", packing.sample().arrays, ids=lambda spec: spec.path)
def test_arrays_read_as_they_were_written(pristine: Path, spec: ArraySpec) -> None:
    stored = PackedStore.open(pristine).array(spec.path)
    logical = packing.sample().logical[spec.path]
    tensor = stored.tensor()
    assert tensor.dtype == ELEMENTS[spec.element].torch
    assert tuple(tensor.shape) == spec.shape
    assert np.array_equal(_bits(tensor), logical.reshape(-1).view(np.uint8))
    assert (stored.spec.shape, stored.spec.chunk, stored.spec.shard) == (
        spec.shape,
        spec.chunk,
        spec.shard,
    )


def test_slabs_are_the_physical_order(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    for path, slabs in {"layers/0/attn/wo_b": 4, "layers/0/attn/wq_a": 2, "head": 1}.items():
        for member in ("codes", "scales"):
            logical = packing.sample().logical[f"{path}/{member}"]
            count = slabs if logical.ndim == 3 or member == "codes" else 1
            physical = store.array(f"{path}/{member}").slabs()
            expected = np.stack(np.split(logical, count, axis=1))
            assert tuple(physical.shape) == expected.shape
            assert np.array_equal(_bits(physical), expected.reshape(-1).view(np.uint8))


def test_rows_of_a_stack(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    for kind, slabs in (("w13", 1), ("w2", 2)):
        for member in ("codes", "scales"):
            path = f"layers/0/ffn/experts/{kind}/{member}"
            logical = packing.sample().logical[path]
            for expert in range(packing.EXPERTS):
                row = store.array(path).row(expert)
                expected = np.stack(np.split(logical[expert], slabs, axis=1))
                assert tuple(row.shape) == expected.shape
                assert np.array_equal(_bits(row), expected.reshape(-1).view(np.uint8))
    with pytest.raises(IndexError, match="row 4"):
        store.array(path).row(4)


def test_general_chunk_grids(tmp_path: Path) -> None:
    """Any cut that the schema allows reads back, whether or not it can be mapped in order."""
    draw = np.random.default_rng(0)
    specs = [
        ArraySpec("a", (6, 4, 8), "uint8", (2, 2, 4), (6, 4, 8)),
        ArraySpec("b", (6, 4, 8), "e8m0", (1, 2, 4), (3, 4, 8)),
        ArraySpec("c", (6, 4, 8), "bfloat16", (1, 1, 2), (2, 4, 8)),
        ArraySpec("d", (6, 4, 8), "int64", (3, 4, 8), (3, 4, 8)),
        ArraySpec("e", (6,), "float32", (2,), (6,)),
        ArraySpec("f", (), "float32", (), ()),
        ArraySpec("g", (6, 4, 8), "e4m3", (1, 4, 2), (2, 4, 8)),
    ]
    with StoreWriter(tmp_path / "s", packing.IDENTITY) as writer:
        logical = {}
        for spec in specs:
            width = ELEMENTS[spec.element].nbytes
            raw = draw.integers(0, 256, (*spec.shape, width), dtype=np.uint8)
            logical[spec.path] = raw.view(f"<u{width}")[..., 0]
            for file in spec.files():
                writer.write(file, packing.physical_parts(spec, file, logical[spec.path]))
        named = [
            ArraySpec(s.path, s.shape, s.element, s.chunk, s.shard, packing.plain(s.path))
            for s in specs
        ]
        writer.finish({}, named, packing.manifest())
    store = PackedStore.open(tmp_path / "s")
    for spec in specs:
        found = store.tensor(spec.path)
        assert tuple(found.shape) == spec.shape
        assert np.array_equal(_bits(found), np.ravel(logical[spec.path]).view(np.uint8))
    assert tuple(store.array("g").row(5).shape) == (4, 4, 2)
    assert np.array_equal(_bits(store.array("d").row(5)), _bits(store.array("d").tensor()[5]))
    for path in "abc":
        with pytest.raises(StoreError, match=r"cut into slabs|mixes parts"):
            store.array(path).row(0) if path == "a" else store.array(path).slabs()


def _origin(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_no_copies(pristine: Path) -> None:
    store = PackedStore.open(pristine)

    def shared(read: Callable[[], Tensor]) -> bool:
        first, second = read(), read()
        return _origin(first) == _origin(second)

    stack = store.array("layers/0/ffn/experts/w2/codes")
    assert shared(store.array("norm/weight").tensor)
    assert shared(store.array("layers/0/attn/wo_b/codes").slabs)
    assert shared(lambda: stack.row(3))
    assert _origin(stack.row(2)) == _origin(stack.row(3)) != _origin(stack.row(1))
    assert not shared(store.array("layers/0/attn/wo_b/codes").tensor)  # its columns are cut
    experts = store.experts(packing.STACK)
    assert _origin(experts.w2(2).codes) == _origin(stack.row(2))
    assert _origin(experts.w13(0).scales) == _origin(experts.w13(1).scales)


def test_writing_to_a_tensor_leaves_the_file_alone(store: Path) -> None:
    before = packing.tree(store)
    PackedStore.open(store).tensor("norm.weight").fill_(7)
    assert packing.tree(store) == before


def test_matrices(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    wo_b = store.matrix("layers.0.attn.wo_b.weight")
    assert isinstance(wo_b, Nvfp4Matrix)
    assert (wo_b.rows, wo_b.cols, tuple(wo_b.codes.shape)) == (256, 256, (4, 256, 32))
    head = store.matrix("head.weight")
    assert isinstance(head, Nvfp4Matrix)
    assert (head.rows, head.cols, tuple(head.codes.shape)) == (72, 100, (1, 72, 64))
    wq_a = store.matrix("layers.0.attn.wq_a.weight")
    assert isinstance(wq_a, Fp8Matrix)
    assert wq_a.scales.dtype == torch.float8_e8m0fnu
    assert isinstance(store.matrix("embed.weight"), Tensor)
    experts = store.experts(packing.STACK)
    assert (len(experts), experts.interleave) == (packing.EXPERTS, 8)
    assert (experts.w13(1).rows, experts.w13(1).cols, experts.w13(1).interleave) == (256, 256, 8)
    assert (experts.w2(1).rows, experts.w2(1).cols, experts.w2(1).interleave) == (256, 128, 0)


def test_what_is_not_there_is_refused_by_name(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    with pytest.raises(StoreError, match="is quantised"):
        store.tensor("head.weight")
    for read in (
        lambda: store.tensor("nope"),
        lambda: store.matrix("nope"),
        lambda: store.array("nope"),
        lambda: store.experts("layers.7.ffn.experts"),
        lambda: store.experts("../x"),
        lambda: store.verify("nope"),
        lambda: store.chunk_digests("nope"),
    ):
        with pytest.raises(StoreError, match=r"nope|layers\.7|refused"):
            read()


def test_config_assets_manifest(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    assert store.config == packing.config()
    assert {name: path.read_bytes() for name, path in store.assets.items()} == packing.ASSETS
    assert store.manifest["recipe"] == "standard"
    assert check_root(store) == store.manifest["root"]
    assert list(damage(store)) == []


def test_a_store_can_be_moved_and_opened_by_a_relative_path(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    PackedStore.open("moved").verify()


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_mapping_keeps_no_file_descriptors(pristine: Path) -> None:
    opened = PackedStore.open(pristine)
    before = _open_descriptors()
    tensors = [opened.array(path).tensor() for path in opened.hierarchy.arrays]
    assert _open_descriptors() == before
    assert len(tensors) > 10


# --- damage -------------------------------------------------------------------------------------


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
    "file became a directory": ("no regular file", lambda s: _replace_by_directory(s / CODES)),
    "file became a link": ("no regular file", lambda s: _replace_by_link(s / CODES)),
    "missing asset": ("assets/LICENSE: .*missing", lambda s: (s / "assets/LICENSE").unlink()),
    "missing marker": ("no packed checkpoint", lambda s: (s / MARKER).unlink()),
    "unfinished": ("unfinished.*again", _unfinish),
    "missing metadata": (r"zarr\.json cannot be read", lambda s: (s / "zarr.json").unlink()),
    "altered metadata": ("altered", lambda s: _flip(s / "zarr.json", 500)),
    "metadata is a link": ("no regular file", lambda s: _replace_by_link(s / "zarr.json")),
    "no such directory": ("no packed checkpoint", lambda s: shutil.rmtree(s)),
}


@pytest.mark.parametrize("case", REFUSED_AT_OPEN)
def test_refused_at_open(store: Path, case: str) -> None:
    pattern, harm = REFUSED_AT_OPEN[case]
    harm(store)
    with pytest.raises(StoreError, match=pattern) as caught:
        PackedStore.open(store)
    assert str(caught.value).startswith(f"{store}: ")
    assert "\n" not in str(caught.value)


MARKERS = {
    "other root": {"root": "0" * 64},
    "no root": {"root": None},
    "short root": {"root": "ab"},
    "shouted root": {"root": "A" * 64},
    "other version": {"format_version": 2},
    "true version": {"format_version": True},
    "text version": {"format_version": "1"},
    "other metadata": {"metadata_sha256": "0" * 64},
}


@pytest.mark.parametrize("case", MARKERS)
def test_an_edited_marker_is_refused(store: Path, case: str) -> None:
    marker = json.loads((store / MARKER).read_text())
    (store / MARKER).write_text(json.dumps(marker | MARKERS[case]))
    with pytest.raises(StoreError, match=r"altered|malformed|format version"):
        PackedStore.open(store)


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
            opened.verify(path)
    opened.verify("layers/0/ffn/experts/w13")
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
    opened.verify()


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
    with pytest.raises(StoreError, match="dsv4 repair"):
        opened.verify()


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
        document["attributes"]["dsv4"]["recipe"] = "native"

    packing.edit_metadata(store, forge)
    opened = PackedStore.open(store)
    with pytest.raises(StoreError, match="the metadata was altered"):
        check_root(opened)


# --- the online half ----------------------------------------------------------------------------

_BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    banned = ("zarr", "numcodecs", "safetensors", "huggingface_hub", "google_crc32c")
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.banned:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from dsv4.formats.checkpoint import PackedCheckpoint
import dsv4.formats.store
packed = PackedCheckpoint.open(sys.argv[1])
packed.store.verify()
packed.store.experts("layers.0.ffn.experts").w13(0)
for name in packed.names():
    packed.dequantize(name)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & set(Blocker.banned)
assert not [n for n in sys.modules if n.startswith(("dsv4.convert.", "dsv4.validate."))]
print(len(packed.names()))
"""


def test_reading_needs_no_offline_library(pristine: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BLOCKED, str(pristine)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert int(run.stdout) == 6 + 2 + 12


def test_stored_arrays_are_kept(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    assert store.array("norm/weight") is store.array("norm/weight")
    assert isinstance(store.array("norm/weight"), StoredArray)
