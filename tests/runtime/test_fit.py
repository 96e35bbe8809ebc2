"""`fit` against what a load and a session then ask for, and against published arithmetic."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.convert.metadata import planned_nodes
from dsv4.formats.errors import OutOfSpaceError, RuntimeRefusal
from dsv4.formats.model.releases import FLASH
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime import fit as fitting
from dsv4.runtime import machines
from dsv4.runtime.fit import fit, longest_context, needs_of, remedies
from dsv4.runtime.gpu import engine
from dsv4.runtime.gpu.engine import Engine
from dsv4.runtime.load import arena, load_weights
from dsv4.runtime.load.expert_sizes import (
    ExpertSizes,
    best_residents,
    misses_a_token,
    read_counts,
    residents,
    uniform_misses,
)
from dsv4.runtime.load.plan import MODEL, Share
from dsv4.synthetic.store import make_store, plan_store

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    FLASH,
    vocab_size=256,
    hidden_size=1024,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    num_hash_layers=1,
    q_lora_rank=512,
    o_lora_rank=128,
    moe_intermediate_size=1024,
    n_routed_experts=8,
    num_experts_per_tok=2,
    index_topk=256,
)
"""The smallest that the GPU's kernels take."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    place = tmp_path_factory.mktemp("fit") / "packed"
    make_store(place, SMALL)
    return PackedStore.open(place)


@pytest.fixture(scope="module")
def flash() -> Nodes:
    return planned_nodes(plan_store(FLASH), "flash")


def _starts(store: PackedStore, free: int, context: int, patch: pytest.MonkeyPatch) -> bool:
    """Whether a store loads and opens a session on a device of `free` bytes."""
    taken = 0

    def left(device: torch.device) -> tuple[int, str]:
        return free - taken, "the GPU"

    patch.setattr(arena, "free_memory", left)
    try:
        weights = load_weights(store, "cpu", parts=MODEL)
        taken = weights.reports[0].arena_nbytes
        model: Any = SimpleNamespace(config=store.config, device=CPU, multiprocessors=lambda: 1)
        Engine(model, context)
    except OutOfSpaceError:
        return False
    return True


@pytest.mark.parametrize("context", [1, 200, 3000])
def test_it_fits_exactly_where_a_load_and_a_session_do(
    store: PackedStore, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = needs_of(store, context)
    for free in (needs.whole - 1, needs.whole, needs.whole + 1, needs.arena):
        found = fit(needs, machines.KNOWN[0], free=free)
        assert found.fits == _starts(store, free, context, monkeypatch) == (free >= needs.whole)


def test_a_session_that_grew_is_noticed(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The border is the engine's own: whatever it comes to need, `fit` says."""
    before = needs_of(store, 200).whole
    right = engine.tables_nbytes
    monkeypatch.setattr(engine, "tables_nbytes", lambda c, positions: right(c, positions) + 1)
    assert needs_of(store, 200).whole == before + 1
    assert not _starts(store, before, 200, monkeypatch)


def test_sizes_are_those_of_the_files(store: PackedStore) -> None:
    needs = needs_of(store, 200)
    arrays = store.hierarchy.arrays
    payload = {path: spec.nbytes for path, spec in arrays.items() if "lineage" not in path}
    stacks = sum(n for path, n in payload.items() if "/ffn/experts/" in path)
    assert needs.experts.nbytes + needs.experts.others == stacks
    assert sum(needs.core.values()) == sum(payload.values()) - stacks
    assert needs.experts.records == (3 * 1024 * 1024 * 9 // 16,) * 3
    assert needs.core["embedding"] == 256 * 1024 * 2
    assert needs.core["router gates"] > 0 and needs.core["attention"] > needs.core["head"]
    assert 0 <= needs.arena - sum(payload.values()) < 4096 * len(payload)


def test_shares_of_all_ranks_are_the_whole(store: PackedStore) -> None:
    whole = needs_of(store, 200)
    ranks = [needs_of(store, 200, Share(rank, 4, "expert", "tensor")) for rank in range(4)]
    assert sum(rank.experts.nbytes for rank in ranks) == whole.experts.nbytes
    assert {rank.experts.records for rank in ranks} == {whole.experts.records}
    found = fit(ranks[0], machines.KNOWN[0], gpus=4)
    assert found.reasons == ["runs on 4 GPUs are not built yet"]
    assert list(found.arithmetic()) == ["not known: what GPUs tell each other takes time, too"]


def test_flash_is_what_was_counted_of_it(flash: Nodes) -> None:
    """Bytes of the release's plan; steps of an H200 and an H100 as they were measured or derived;
    misses and tokens/s of uniform routing as another arithmetic has them (77 to 87)."""
    needs = needs_of(flash, 131072)
    assert needs.experts.slot == 14_155_776 and needs.experts.total == 11_008
    assert needs.experts.nbytes == 155_826_782_208
    h200 = fit(needs, machines.find("NVIDIA H200"))
    assert not h200.fits and 0.87 < h200.resident / 11_008 < 0.9
    assert 4.4e-3 < h200.step_seconds < 4.8e-3
    assert 29 < h200.misses < 34 and 70 < h200.tokens_per_second < 90
    assert fit(needs, machines.find("b200")).fits
    said = " ".join(h200.arithmetic())
    assert "258 experts 3.7 GB" in said and "tokens/s" in said and "at 50 GB/s" in said
    offered = list(remedies(flash, h200))
    assert offered[0] == "a GPU that holds all of it: b200"
    assert "pinned host memory for the others (not built yet)" in offered[1]
    assert offered[2].startswith("2 of this GPU")


def test_experts_are_never_over_budget_and_always_some_of_all(flash: Nodes) -> None:
    needs, gpu = needs_of(flash, 8192), machines.find("h200")
    before = -1
    frees = [*range(needs.least - 10**9, needs.whole, 7 * 10**9), needs.whole]
    for free in frees:
        found = fit(needs, gpu, free=free)
        taken = needs.least + found.resident * needs.experts.slot
        assert taken <= free or found.resident == 0
        assert found.resident >= before and found.resident + found.elsewhere == 11_008
        assert found.pinned == found.elsewhere * needs.experts.slot
        before = found.resident
    assert before == 11_008
    few = fit(needs, gpu, experts=10**9)
    assert few.resident == 10**9 // needs.experts.slot
    assert "it needs" in fit(needs, gpu, experts="resident").reasons[0]
    assert "without any expert it needs" in fit(needs, gpu, free=10**9).reasons[0]
    small = fit(needs, gpu, host=10**9)
    assert any("experts in host memory need" in reason for reason in small.reasons)


def test_the_longest_context_is_the_last_that_fits(store: PackedStore) -> None:
    needs = needs_of(store, 100_000)
    longest = longest_context(store, needs, needs.whole - 1)
    assert longest is not None
    assert needs_of(store, longest).whole < needs.whole
    assert needs_of(store, longest + 1).whole >= needs.whole
    assert longest_context(store, needs, needs.whole) is None
    assert longest_context(store, needs, needs.arena) is None


def test_misses_follow_from_counts() -> None:
    sizes = ExpertSizes((10, 10), experts=4, others=0)
    counts = [[5, 0, 3, 2], [1, 1, 1, 97]]
    kept = best_residents(counts, 3)
    assert kept == [{0, 2}, {3}]
    assert misses_a_token(counts, kept, 2) == pytest.approx(2 * 0.2 + 2 * 0.03)
    assert misses_a_token(counts, best_residents(counts, 8), 2) == 0
    alike = [[7] * 4, [7] * 4]
    for slots in range(9):
        uniform = uniform_misses(sizes, slots, 2)
        assert misses_a_token(alike, best_residents(alike, slots), 2) == pytest.approx(uniform)
    assert misses_a_token([[0] * 4], [{1}], 2) == pytest.approx(1.5)
    assert [residents(sizes, budget) for budget in (-1, 9, 10, 79, 80, 999)] == [0, 0, 1, 7, 8, 8]


def test_counts_are_read_and_other_files_refused(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    file.write_text(json.dumps({"decode": [[1, 2], [3, 4]], "prompts": []}))
    assert read_counts(file, 2, 2) == [[1, 2], [3, 4]]
    with pytest.raises(
        RuntimeRefusal, match=r"counts 2 layers of 2 experts, this model has 3 of 2"
    ):
        read_counts(file, 3, 2)
    for text in ("{", "[]", '{"decode": [[-1]]}', '{"decode": [["a"]]}', '{"prompts": []}'):
        file.write_text(text)
        with pytest.raises(RuntimeRefusal, match="is not a routes file, expected JSON"):
            read_counts(file, 1, 1)
    with pytest.raises(RuntimeRefusal, match="cannot be read: No such file"):
        read_counts(tmp_path / "none", 1, 1)


def test_gpus_are_found_by_name_and_others_refused() -> None:
    assert machines.find("H200").name == "h200"
    assert machines.find("NVIDIA H100 NVL").name == "h100-nvl"
    assert machines.find("NVIDIA H100 80GB HBM3").name == "h100"
    with pytest.raises(RuntimeRefusal, match="'a100' is not a GPU that is known here, expected"):
        machines.find("a100")
    other = machines.like("Some GPU", 5 * 10**9)
    assert (other.name, other.memory, other.measured) == ("Some GPU", 5 * 10**9, False)


def test_a_shape_that_no_kernel_takes_is_named() -> None:
    odd = planned_nodes(plan_store(dataclasses.replace(SMALL, q_lora_rank=768)), "odd")
    with pytest.raises(RuntimeRefusal, match="no GPU runs odd: q_lora_rank is 768"):
        fitting.needs_of(odd)
