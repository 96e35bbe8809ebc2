"""What is loaded is what the store holds: read by zarr-python, whole, in parts, and by rank."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import Tensor

from dsv4.formats.errors import OutOfSpaceError, RuntimeRefusal, StoreError
from dsv4.formats.numeric.operands import Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.formats.numeric.slices import expert_slice, tensor_slice
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime.load import EVERYTHING, Part, Settings, Share, arena, load_weights, plan_load
from dsv4.runtime.load.loaded import LoadedWeights
from dsv4.runtime.model import load
from tests.formats.store import packing

FEW = Settings(
    readers=3, slot_nbytes=16 << 10
)  # so that slots are used again and chunks exceed them


def loaded(store: PackedStore, settings: Settings = FEW, **options: object) -> LoadedWeights:
    """On the CPU, by the code that loads to a GPU."""
    return load_weights(store, "cpu", settings=settings, **options)  # type: ignore[arg-type]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes."""
    first, second = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(first, second)


@pytest.mark.parametrize(
    "settings",
    [
        FEW,
        Settings(readers=1, slot_nbytes=4096, slots_a_reader=1),
        Settings(readers=5, slot_nbytes=1 << 20, slots_a_reader=3),
        Settings(readers=2, slot_nbytes=12 << 10, verify="off"),
        Settings(readers=2, slot_nbytes=4096, verify="device"),
        Settings(readers=3, slot_nbytes=20 << 10, verify="device"),
    ],
    ids=str,
)
def test_every_array_is_what_zarr_reads(sample: PackedStore, settings: Settings) -> None:
    weights = loaded(sample, settings)
    group = zarr.open_group(sample.root, mode="r")
    paths = [spec.path for spec in packing.sample().arrays if not spec.path.endswith("/lineage")]
    assert len(paths) == 19
    for path in paths:
        values = np.asarray(group[path][...])  # type: ignore[index]
        array = weights.array(path)
        raw = array.tensor().contiguous().view(torch.uint8).numpy()
        assert raw.tobytes() == values.tobytes(), path
    report = weights.reports[0]
    assert report.nbytes == sum(sample.hierarchy.arrays[path].nbytes for path in paths)
    assert report.spent.bytes == report.nbytes
    assert report.spent.verified_bytes == (report.nbytes if settings.verify != "off" else 0)


def test_weights_by_name_are_those_of_the_mapped_store(standard_store: Path) -> None:
    store = PackedStore.open(standard_store)
    weights = loaded(store)
    for name in store.contents.plain:
        assert same_bytes(weights.tensor(name), store.tensor(name)), name
    for name in store.contents.matrices:
        _same_matrix(weights.matrix(name), store.matrix(name))
    for prefix in {path.rpartition("/")[0].replace("/", ".") for path in store.contents.stacks}:
        ours, theirs = weights.experts(prefix), store.experts(prefix)
        assert len(ours) == len(theirs) and ours.interleave == theirs.interleave
        for expert in range(len(ours)):
            _same_matrix(ours.w13(expert), theirs.w13(expert))
            _same_matrix(ours.w2(expert), theirs.w2(expert))


def _same_matrix(a: Matrix, b: Matrix) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and same_bytes(a, b)
        return
    assert isinstance(b, type(a)) and (a.rows, a.cols) == (b.rows, b.cols)
    assert same_bytes(a.codes, b.codes) and same_bytes(a.scales, b.scales)
    if isinstance(a, Nvfp4Matrix):
        assert isinstance(b, Nvfp4Matrix) and same_bytes(a.global_scales, b.global_scales)
    else:
        assert isinstance(a, Fp8Matrix)


def test_a_model_on_loaded_weights_says_the_same(standard_store: Path) -> None:
    store = PackedStore.open(standard_store)
    ids = torch.tensor([5, 6, 7, 8])
    weights = loaded(store, parts={Part.CORE, Part.EXPERTS})
    ours, theirs = (load(one).session(8).forward(ids) for one in (weights, store))
    assert torch.equal(ours, theirs)


def test_operands_lie_in_the_arena(standard_store: Path) -> None:
    store = PackedStore.open(standard_store)
    weights = loaded(store)
    [resident] = weights._resident
    inside = resident.arena.bytes.untyped_storage().data_ptr()
    stack = weights.experts("layers.0.ffn.experts").w13(1)
    assert isinstance(stack, Nvfp4Matrix)
    dense = weights.matrix("layers.0.attn.wq_a.weight")
    assert isinstance(dense, Fp8Matrix)
    for tensor in (stack.codes, stack.scales, dense.codes, dense.scales):
        assert tensor.untyped_storage().data_ptr() == inside
    for placed in resident.plan.arrays.values():
        assert placed.at % 4096 == 0


def test_parts_are_left_out_loaded_later_and_given_back(standard_store: Path) -> None:
    store = PackedStore.open(standard_store)
    weights = loaded(store, parts={Part.CORE})
    assert same_bytes(weights.tensor("norm.weight"), store.tensor("norm.weight"))
    with pytest.raises(StoreError, match=r"layers/0/ffn/experts/w13/codes' is not loaded"):
        weights.experts("layers.0.ffn.experts")
    with pytest.raises(StoreError, match=r"mtp/0/e_proj/codes' is not loaded"):
        weights.matrix("mtp.0.e_proj.weight")
    with pytest.raises(RuntimeRefusal, match="core are loaded already"):
        weights.load({Part.CORE, Part.DRAFT})
    weights.load({Part.DRAFT})
    weights.load({Part.EXPERTS})
    _same_matrix(weights.matrix("mtp.0.e_proj.weight"), store.matrix("mtp.0.e_proj.weight"))
    weights.experts("layers.0.ffn.experts")
    assert sum(report.nbytes for report in weights.reports) == loaded(store).reports[0].nbytes

    memory = weakref.ref(weights._resident[1].arena)
    with pytest.raises(RuntimeRefusal, match="not loaded together; loaded are core and draft"):
        weights.drop({Part.CORE, Part.DRAFT})
    weights.drop({Part.DRAFT})
    gc.collect()
    assert memory() is None
    with pytest.raises(StoreError, match="is not loaded"):
        weights.matrix("mtp.0.e_proj.weight")


@pytest.fixture(scope="module")
def wide_store(wide_path: Path) -> PackedStore:
    return PackedStore.open(wide_path)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(("experts", "dense"), [("expert", "whole"), ("tensor", "tensor")])
def test_shares_of_all_ranks_make_the_array(
    wide_store: PackedStore, world: int, experts: str, dense: str
) -> None:
    ranks = [
        loaded(wide_store, share=Share(rank, world, experts, dense))  # type: ignore[arg-type]
        for rank in range(world)
    ]
    cut = 0
    for path, spec in wide_store.hierarchy.arrays.items():
        if path.endswith("/lineage"):
            continue
        parts = [rank.share_of(path) for rank in ranks]
        whole = loaded(wide_store).share_of(path) if world > 1 else parts[0]
        if all(part.shape == whole.shape for part in parts):
            assert all(same_bytes(part, whole) for part in parts)
            continue
        cut += 1
        [axis] = [i for i, size in enumerate(parts[0].shape) if size != whole.shape[i]]
        joined = torch.cat([part.view(torch.uint8) for part in parts], axis)
        assert torch.equal(joined, whole.view(torch.uint8)), path
        by_expert = "/experts/" in path and experts == "expert"
        ranges = (expert_slice if by_expert else tensor_slice)(spec, 0, world)
        raw = b"".join((wide_store.root / r.key).read_bytes()[r.begin : r.end] for r in ranges)
        assert parts[0].contiguous().view(torch.uint8).numpy().tobytes() == raw
    assert cut == 0 if world == 1 else cut >= 4
    if world > 1:
        of_one = sum(rank.reports[0].nbytes for rank in ranks) / world
        assert of_one < loaded(wide_store).reports[0].nbytes


def test_a_share_is_no_whole_matrix(wide_store: PackedStore) -> None:
    weights = loaded(wide_store, share=Share(1, 2))
    with pytest.raises(StoreError, match="only a share is loaded"):
        weights.experts("layers.0.ffn.experts").w13(0)
    weights.matrix("layers.0.attn.wq_a.weight")
    with pytest.raises(RuntimeRefusal, match="rank 2 of 2"):
        Share(2, 2)


def test_what_does_not_fit_is_refused_before_it_is_allocated(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan_load(sample).nbytes
    monkeypatch.setattr(arena, "_free_host_memory", lambda: needed + arena.HEADROOM - 1)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("something was allocated"))
    with pytest.raises(OutOfSpaceError, match=r"weights need .*, this machine has"):
        loaded(sample)
    assert OutOfSpaceError.exit_code == 3


def test_a_device_that_is_not_there_is_refused(sample: PackedStore) -> None:
    for device in ("meta", "cuda"):
        if device == "meta" or not torch.cuda.is_available():
            with pytest.raises(RuntimeRefusal, match=f"cannot be loaded to {device}"):
                load_weights(sample, device)
    with pytest.raises(RuntimeRefusal, match="nothing to load of draft"):
        loaded(sample, parts={Part.DRAFT})
    assert frozenset(Part) == EVERYTHING


def test_settings_are_checked() -> None:
    assert 1 <= Settings().threads <= 6 and Settings(readers=9).threads == 9
    for wrong in ({"readers": -1}, {"slots_a_reader": 0}, {"slot_nbytes": 1000}):
        with pytest.raises(RuntimeRefusal, match=r"expected a multiple|have to be"):
            Settings(**wrong)  # type: ignore[arg-type]


def test_the_report_names_every_phase(sample: PackedStore) -> None:
    report = loaded(sample).reports[0]
    text = "\n".join(report.lines(bus=55e9))
    for phase in ("load ", "place ", "read ", "verify ", "copy ", "of the bus", "GB/s"):
        assert phase in text
    assert report.rate == report.nbytes / report.move
    off = "\n".join(loaded(sample, Settings(verify="off")).reports[0].lines())
    assert "verify  off" in off and "of the" not in off
