"""Rank slices: every parallel degree from one artefact, as aligned byte ranges."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.convert.plan import Plan, make_plan
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import FormatError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.numeric.layouts import dequantize
from dsv4.formats.numeric.operands import Nvfp4Matrix
from dsv4.formats.numeric.slices import ByteRange, expert_slice, ranks, share, tensor_slice, whole
from dsv4.formats.store.specs import ArraySpec
from tests.convert.header_source import HeaderSource
from tests.support.real_configs import PUBLISHED

ALIGNMENT = 4096
WORLDS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def flash_arrays() -> dict[str, ArraySpec]:
    published = PUBLISHED["Flash"]
    source = HeaderSource(published.config, DraftKind(published.draft))
    plan: Plan = make_plan(source, make_recipe("standard"))
    return {array.path: array for output in plan.outputs for array in output.arrays()}


@pytest.fixture(scope="module")
def wide_store(wide_path: Path) -> PackedCheckpoint:
    return PackedCheckpoint.open(wide_path)


def _read(packed: PackedCheckpoint, ranges: list[ByteRange]) -> Tensor:
    """The bytes of the ranges, one after another, as a loader would place them."""
    raw = bytearray()
    for part in ranges:
        with (packed.store.root / part.key).open("rb") as file:
            file.seek(part.begin)
            raw += file.read(part.nbytes)
    return torch.frombuffer(raw, dtype=torch.uint8)


@pytest.mark.parametrize("world", WORLDS)
def test_flash_parts_are_aligned_disjoint_and_complete(
    flash_arrays: dict[str, ArraySpec], world: int
) -> None:
    for stack in ("w13", "w2"):
        for member in ("codes", "scales"):
            spec = flash_arrays[f"layers/7/ffn/experts/{stack}/{member}"]
            for experts in (True, False):
                parts = list(ranks(spec, world, experts=experts))
                sizes = {sum(r.nbytes for r in part) for part in parts}
                assert sizes == {spec.nbytes // world}  # equal parts, nothing lost
                flat = sorted((r for part in parts for r in part), key=lambda r: (r.key, r.begin))
                for before, after in itertools.pairwise(flat):
                    assert before.key != after.key or before.end <= after.begin
                assert all(r.begin % ALIGNMENT == r.end % ALIGNMENT == 0 for r in flat)
                if experts:
                    assert all(len(part) <= 8 for part in parts)


def test_the_vocabulary_is_shared_in_whole_tiles(flash_arrays: dict[str, ArraySpec]) -> None:
    spec = flash_arrays["head/codes"]
    parts = list(ranks(spec, 8, experts=False))
    assert sum(r.nbytes for part in parts for r in part) == spec.nbytes
    assert all(len(part) == 1 for part in parts)
    sizes = [part[0].nbytes for part in parts]
    assert max(sizes) - min(sizes) <= spec.chunk_nbytes


@pytest.mark.parametrize("world", WORLDS)
def test_tensor_parallel_experts_compute_the_whole(
    wide_store: PackedCheckpoint, world: int
) -> None:
    """Slices of w13 and w2, read as dense operands, hold the rows and columns of the whole."""
    arrays = wide_store.store.hierarchy.arrays
    experts = wide_store.store.experts("layers.0.ffn.experts")
    base = "layers/0/ffn/experts"
    expert = 5
    full13, full2 = experts.w13(expert), experts.w2(expert)
    assert isinstance(full13, Nvfp4Matrix)
    assert isinstance(full2, Nvfp4Matrix)
    rows13, columns2 = [], []
    for rank in range(world):
        parts = {
            f"{stack}/{member}": _read(
                wide_store, tensor_slice(arrays[f"{base}/{stack}/{member}"], rank, world)
            )
            for stack in ("w13", "w2")
            for member in ("codes", "scales")
        }
        per_rank = full13.rows // world
        w13 = Nvfp4Matrix(
            parts["w13/codes"].view(8, 1, per_rank, -1)[expert],
            parts["w13/scales"].view(8, 1, per_rank // 128, -1, 512)[expert],
            full13.global_scales,
            per_rank,
            full13.cols,
            full13.interleave,
        )
        slabs = full2.codes.shape[0] // world
        w2 = Nvfp4Matrix(
            parts["w2/codes"].view(8, slabs, full2.rows, -1)[expert],
            parts["w2/scales"].view(8, slabs, full2.rows // 128, -1, 512)[expert],
            full2.global_scales,
            full2.rows,
            full2.cols // world,
        )
        rows13.append(dequantize(w13))
        columns2.append(dequantize(w2))
    assert torch.equal(torch.cat(rows13), dequantize(full13))
    assert torch.equal(torch.cat(columns2, dim=1), dequantize(full2))


@pytest.mark.parametrize("world", WORLDS)
def test_expert_parallel_parts_are_whole_experts(wide_store: PackedCheckpoint, world: int) -> None:
    spec = wide_store.store.hierarchy.arrays["layers/0/ffn/experts/w2/codes"]
    parts = [_read(wide_store, expert_slice(spec, rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat(parts), _read(wide_store, whole(spec)))
    per_expert = spec.nbytes // spec.shape[0]
    assert all(part.numel() == per_expert * (8 // world) for part in parts)


def test_small_arrays_go_whole_to_every_rank(flash_arrays: dict[str, ArraySpec]) -> None:
    spec = flash_arrays["layers/7/attn_norm/weight"]
    assert tensor_slice(spec, 3, 4) == whole(spec)


def test_shares_cover_everything_once() -> None:
    for units in (1, 7, 8, 1010):
        for world in range(1, 17):
            runs = [share(units, rank, world) for rank in range(world)]
            assert runs[0][0] == 0
            assert runs[-1][1] == units
            assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))


def test_ranks_that_do_not_exist_are_refused(flash_arrays: dict[str, ArraySpec]) -> None:
    spec = flash_arrays["head/codes"]
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(FormatError, match="does not exist"):
            tensor_slice(spec, rank, world)
