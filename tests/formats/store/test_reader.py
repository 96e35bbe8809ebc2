"""Tensors as they were written, without copies, and without any offline library."""

from __future__ import annotations

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
from dsv4.formats.numeric.operands import Fp8Matrix, Nvfp4Matrix
from dsv4.formats.store.integrity import check_root, damage, verify
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ELEMENTS, ArraySpec
from dsv4.formats.store.writer import StoreWriter
from tests.formats.store import packing


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
    w2, first, second = experts.w2(2), experts.w13(0), experts.w13(1)
    assert isinstance(w2, Nvfp4Matrix)
    assert isinstance(first, Nvfp4Matrix)
    assert isinstance(second, Nvfp4Matrix)
    assert _origin(w2.codes) == _origin(stack.row(2))
    assert _origin(first.scales) == _origin(second.scales)


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
    w13, w2 = experts.w13(1), experts.w2(1)
    assert isinstance(w13, Nvfp4Matrix)
    assert isinstance(w2, Nvfp4Matrix)
    assert (w13.rows, w13.cols, w13.interleave) == (256, 256, 8)
    assert (w2.rows, w2.cols, w2.interleave) == (256, 128, 0)


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
        lambda: verify(store, "nope"),
        lambda: store.chunk_digests("nope"),
    ):
        with pytest.raises(StoreError, match=r"nope|layers\.7|refused"):
            read()


def test_config_assets_manifest(pristine: Path) -> None:
    store = PackedStore.open(pristine)
    assert store.config == packing.config()
    assert {name: path.read_bytes() for name, path in store.assets.items()} == packing.ASSETS
    assert store.manifest["recipe"] == {"name": "standard", "keep": []}
    assert check_root(store) == store.manifest["root"]
    assert list(damage(store)) == []


def test_a_marker_of_many_digits_and_none_are_refused_in_our_words(store: Path) -> None:
    (store / "dsv4.complete").write_text('{"format_version": ' + "1" * 5000 + "}")
    with pytest.raises(StoreError, match=r"holds a number of thousands of digits$"):
        PackedStore.open(store)
    (store / "dsv4.complete").unlink()
    with pytest.raises(StoreError, match="remove the directory and run the same `dsv4 convert`"):
        PackedStore.open(store)


def test_a_store_can_be_moved_and_opened_by_a_relative_path(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    verify(PackedStore.open("moved"))


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_mapping_keeps_no_file_descriptors(pristine: Path) -> None:
    opened = PackedStore.open(pristine)
    before = _open_descriptors()
    tensors = [opened.array(path).tensor() for path in opened.hierarchy.arrays]
    assert _open_descriptors() == before
    assert len(tensors) > 10


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
import dsv4.formats.store.integrity
packed = PackedCheckpoint.open(sys.argv[1])
dsv4.formats.store.integrity.verify(packed.store)
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
