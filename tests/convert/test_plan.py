"""Plans of the real releases, from headers alone: sizes, cuts, alignment, exactness."""

from __future__ import annotations

import math

import pytest

from dsv4.convert.outputs.stack import ExpertsOutput
from dsv4.convert.plan import Plan, make_plan
from dsv4.formats.errors import ConfigError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.store.specs import ArraySpec, FileSpec
from tests.convert.header_source import HeaderSource
from tests.support.real_configs import PUBLISHED, Published

ALIGNMENT = 4096


def _plan(published: Published, recipe: str = "standard", keep: tuple[str, ...] = ()) -> Plan:
    source = HeaderSource(published.config, DraftKind(published.draft))
    return make_plan(source, make_recipe(recipe, keep))


@pytest.fixture(scope="module")
def flash() -> Plan:
    return _plan(PUBLISHED["Flash"])


@pytest.fixture(scope="module")
def pro() -> Plan:
    return _plan(PUBLISHED["Pro"])


def _arrays(plan: Plan) -> dict[str, ArraySpec]:
    return {array.path: array for output in plan.outputs for array in output.arrays()}


@pytest.mark.parametrize("release", ["Flash", "Pro"])
def test_native_bytes_are_the_sources_plus_the_finer_scales(release: str) -> None:
    """NVFP4 has a scale byte per 16 columns where MXFP4 has one per 32; the rest is carried."""
    published = PUBLISHED[release]
    plan = _plan(published, "native")
    payload = sum(array.nbytes for array in _arrays(plan).values())
    stacks = [output for output in plan.outputs if isinstance(output, ExpertsOutput)]
    finer = sum(
        len(stack.experts) * stack.projections * math.prod(stack.shape) // 32 for stack in stacks
    )
    # Per stack and expert: global scales (4 bytes a projection), lineage (8 int64 a projection).
    small = sum(len(stack.experts) * stack.projections * (4 + 64) for stack in stacks)
    assert plan.source_bytes == published.payload_bytes
    assert payload == published.payload_bytes + finer + small


def test_standard_rounds_gates_and_head_only(flash: Plan) -> None:
    rounded = flash.to_dict()["rounded_tensors"]
    gates = [f"layers.{n}.ffn.gate.weight" for n in range(43)] + ["mtp.0.ffn.gate.weight"]
    assert sorted(rounded) == sorted([*gates, "head.weight"])


def test_keep_leaves_matching_tensors_alone() -> None:
    plan = _plan(PUBLISHED["Flash"], "standard", ("head.*", "layers.4.*"))
    rounded = plan.to_dict()["rounded_tensors"]
    assert "head.weight" not in rounded
    assert "layers.4.ffn.gate.weight" not in rounded
    assert len(rounded) == 43


def test_recipe_nvfp4_rounds_the_dense_matrices_too() -> None:
    rounded = _plan(PUBLISHED["Flash"], "nvfp4").to_dict()["rounded_tensors"]
    per_block = 1 + 5 + 3  # gate, attention, shared expert
    assert len(rounded) == 44 * per_block + 21 + 1  # 21 CSA indexers, one head
    assert "embed.weight" not in rounded
    assert not any("compressor" in name or "norm" in name for name in rounded)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="recipe 'q4' is unknown; choose one of native"):
        make_recipe("q4")


@pytest.mark.parametrize("release", ["Flash", "Pro"])
def test_expert_stacks_cut_eight_ways_by_expert_and_by_inner_dimension(release: str) -> None:
    arrays = _arrays(_plan(PUBLISHED[release]))
    for stack in ("w13", "w2"):
        codes = arrays[f"layers/2/ffn/experts/{stack}/codes"]
        scales = arrays[f"layers/2/ffn/experts/{stack}/scales"]
        for array in (codes, scales):
            assert array.shape[0] // array.shard[0] == 8  # expert parallelism: whole files
            assert array.chunk[0] == 1  # one expert is one contiguous range
            assert array.row_addressable
            assert math.prod(array.shard[1:]) // math.prod(array.chunk[1:]) == 8
            assert array.chunk_nbytes % ALIGNMENT == 0
        axis = 1 if stack == "w13" else 2  # rows of w13, columns of w2
        assert codes.shape[axis] == 8 * codes.chunk[axis]


@pytest.mark.parametrize("release", ["Flash", "Pro"])
def test_dense_matrices_cut_as_tensor_parallelism_needs(release: str) -> None:
    arrays = _arrays(_plan(PUBLISHED[release]))
    for name, axis in (("wq_b", 0), ("wo_a", 0), ("wo_b", 1)):
        codes = arrays[f"layers/2/attn/{name}/codes"]
        assert codes.shape[axis] == 8 * codes.chunk[axis], name
        assert codes.chunk_nbytes % ALIGNMENT == 0
    embed = arrays["embed/weight"]
    assert embed.shape[0] == 8 * embed.chunk[0]
    head = arrays["head/codes"]
    assert head.chunk[0] % 128 == 0  # whole scale tiles: ranks take runs of them
    assert head.shape[0] // head.chunk[0] >= 8


def test_every_cut_chunk_is_aligned(flash: Plan, pro: Plan) -> None:
    for plan in (flash, pro):
        for array in _arrays(plan).values():
            file = array.files()[0]
            if file.chunks > 1:
                assert array.chunk_nbytes % ALIGNMENT == 0, array.path


def test_no_unit_holds_more_than_two_gibibytes(flash: Plan, pro: Plan) -> None:
    assert max(output.peak_bytes() for output in flash.outputs) < 1 << 30
    assert max(output.peak_bytes() for output in pro.outputs) < 2 << 30


def test_units_write_every_file_once(flash: Plan) -> None:
    """All but the small arrays of the stacks, which are written whole at the end."""
    targets = [target for unit in flash.units for target in unit.targets]
    ranges: dict[FileSpec, list[tuple[int, int]]] = {}
    for file, begin, end in targets:
        ranges.setdefault(file, []).append((begin, end))
    for file, found in ranges.items():  # end to end, without gap or overlap
        edges = [0, *(end for _, end in sorted(found))]
        assert [begin for begin, _ in sorted(found)] == edges[:-1], file.key
        assert edges[-1] == file.payload_nbytes
    written = [file.key for file in ranges]
    late = [file.key for file in flash.files() if file.key not in set(written)]
    assert {key.split("/")[5] for key in late} == {"global_scale", "lineage"}
    assert len(late) == 44 * 2 * 2
    written += late
    expected = [file.key for array in _arrays(flash).values() for file in array.files()]
    assert sorted(written) == sorted(expected)
