"""`fit` against what a load and a session then ask for, and against published arithmetic."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsv4.convert.metadata import planned_nodes
from dsv4.formats.errors import KernelError, OutOfSpaceError, RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.releases import FLASH
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime import cuda_driver, machines
from dsv4.runtime import fit as fitting
from dsv4.runtime.fit import fit, longest_context, needs_of, remedies
from dsv4.runtime.gpu import engine, load
from dsv4.runtime.gpu.engine import Engine
from dsv4.runtime.gpu.load import plan_experts
from dsv4.runtime.load import Settings, arena, load_weights, records
from dsv4.runtime.load.placement import Counts, Experts, Placement
from dsv4.runtime.load.plan import MODEL, Share
from dsv4.synthetic.store import make_store, plan_store
from tests.support.emulated_driver import EmulatedCuda

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


def _started(
    store: PackedStore,
    free: int,
    context: int,
    patch: pytest.MonkeyPatch,
    experts: Experts = "auto",
    counts: Counts | None = None,
) -> Placement | None:
    """Where experts are once a store is loaded and a session is open on a device of `free` bytes;
    None where one of them is refused.
    """
    taken = 0

    def left(device: torch.device) -> tuple[int, str]:
        return free - taken, "the GPU"

    cuda = EmulatedCuda()
    patch.setattr(cuda_driver, "_libraries", lambda: (cuda, cuda))
    patch.setattr(records, "require_memory", lambda *given: None)  # of the host
    for module in (arena, load):
        patch.setattr(module, "free_memory", left)
    try:
        placement = plan_experts(store, CPU, experts, counts, 1, context)
        taken += load_weights(store, CPU, parts=MODEL, records=True).reports[0].arena_nbytes
        loaded = records.load_records(
            store, placement, CPU, Settings(verify="off"), cuda_driver.Driver
        )
        taken += loaded.device.nbytes
        model: Any = SimpleNamespace(config=store.config, device=CPU, multiprocessors=lambda: 1)
        model.operands = SimpleNamespace(draft=None)
        Engine(model, context)
    except OutOfSpaceError:
        return None
    assert len(loaded.device) == placement.records and len(loaded.host) == placement.cold
    return placement


@pytest.mark.parametrize("context", [1, 3000])
@pytest.mark.parametrize("asked", ["auto", "resident", 40_000_000])
def test_it_fits_exactly_where_a_load_and_a_session_do(
    store: PackedStore, context: int, asked: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as many experts stay on the GPU, and as many misses are expected, as the loader says."""
    needs = needs_of(store, context)
    counts = np.random.default_rng(3).pareto(1, (3, 8))
    least = needs.beside + 2 * 8 * needs.experts.record_nbytes  # spare records for two layers
    some = range(least, needs.whole, 3 * needs.experts.record_nbytes)
    ends = [*some, needs.arena, needs.whole, needs.beside + 40_000_000]
    fitted = []
    for free in sorted({end + more for end in ends for more in (-1, 0)}):
        for known in (None, counts):
            found = fit(needs, machines.KNOWN[0], free=free, experts=asked, counts=known)
            placed = _started(store, free, context, monkeypatch, asked, known)
            assert found.fits == (placed is not None)
            if placed is None:
                continue
            fitted.append((free, found.resident + found.spare))
            assert (found.resident, found.spare) == (int(placed.hot.sum()), placed.spare)
            assert found.elsewhere == placed.cold
            assert found.misses == placed.misses(known, 2)
    borders = {"auto": least, "resident": needs.whole, 40_000_000: needs.beside + 40_000_000}
    assert fitted[0][0] == borders[asked]
    assert fitted[-1][1] == (
        24 if isinstance(asked, str) else 40_000_000 // needs.experts.record_nbytes
    )


def test_a_session_that_grew_is_noticed(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The border is the engine's own: whatever it comes to need, `fit` says."""
    before = needs_of(store, 200).whole
    right = engine.tables_nbytes
    assert _started(store, before, 200, monkeypatch, "resident") is not None
    monkeypatch.setattr(engine, "tables_nbytes", lambda c, positions: right(c, positions) + 1)
    assert needs_of(store, 200).whole == before + 1
    assert _started(store, before, 200, monkeypatch, "resident") is None


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
    loaded = needs.arena + needs.experts.nbytes
    assert 0 <= loaded - sum(payload.values()) < 4096 * len(payload)


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
    misses and tokens/s of uniform routing near another arithmetic's (29 to 34, 77 to 87), which
    leaves no room for spare records and what runs beside."""
    needs = needs_of(flash, 131072)
    assert needs.experts.record_nbytes == 14_155_776 and needs.experts.total == 11_008
    assert needs.experts.nbytes == 155_826_782_208
    h200 = fit(needs, machines.find("NVIDIA H200"))
    assert h200.fits and 0.86 < h200.resident / 11_008 < 0.89
    assert h200.spare == 2 * -(-h200.elsewhere // 43)  # the cold ones of two layers
    assert 4.4e-3 < h200.step_seconds < 4.8e-3
    assert 29 < h200.misses < 36 and 65 < h200.tokens_per_second < 90
    assert fit(needs, machines.find("b200")).fits
    said = " ".join(h200.arithmetic())
    assert "258 experts 3.7 GB" in said and "tokens/s" in said and "at 50 GB/s" in said
    refused = fit(needs, machines.find("h200"), experts="resident")
    assert not refused.fits and refused.resident == h200.resident
    offered = list(remedies(flash, refused))
    assert offered[0] == "a GPU that holds all of it: b200"
    assert offered[1].startswith("--experts auto: 9,") and "pinned host memory" in offered[1]
    assert offered[2].startswith("2 of this GPU")


def test_experts_are_never_over_budget_and_always_some_of_all(flash: Nodes) -> None:
    needs, gpu = needs_of(flash, 8192), machines.find("h200")
    before = -1
    frees = [*range(needs.beside - 10**9, needs.whole, 7 * 10**9), needs.whole]
    for free in frees:
        found = fit(needs, gpu, free=free)
        taken = needs.beside + (found.resident + found.spare) * needs.experts.record_nbytes
        assert taken <= free or not found.fits
        assert found.resident >= before and found.resident + found.elsewhere == 11_008
        assert found.pinned == found.elsewhere * needs.experts.record_nbytes
        before = found.resident
    assert before == 11_008
    few = fit(needs, gpu, experts=10**10)
    assert few.fits and few.resident + few.spare == 10**10 // needs.experts.record_nbytes
    (reason,) = fit(needs, gpu, experts="resident").reasons
    assert reason.startswith("the experts need 155.8 GB, h200 has 13")
    (reason,) = fit(needs, gpu, free=10**9).reasons
    assert reason.startswith("experts in two places need 7.2 GB on the GPU at the most")
    (reason,) = fit(needs, gpu, experts=150 * 10**9).reasons
    assert reason.startswith("150.0 GB of experts were asked for, h200 has 13")
    pinned = fit(needs, gpu).pinned
    assert fit(needs, gpu, host=pinned + arena.HEADROOM).fits
    (reason,) = fit(needs, gpu, host=pinned + arena.HEADROOM - 1).reasons
    assert reason.startswith(f"experts in host memory need {pinned / 1e9:.1f} GB of it")


def test_the_longest_context_is_the_last_that_fits(store: PackedStore) -> None:
    needs = needs_of(store, 100_000)
    longest = longest_context(store, needs, needs.whole - 1)
    assert longest is not None
    assert needs_of(store, longest).whole < needs.whole
    assert needs_of(store, longest + 1).whole >= needs.whole
    assert longest_context(store, needs, needs.whole) is None
    assert longest_context(store, needs, needs.arena) is None


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


DRAFTING = dataclasses.replace(
    SMALL,
    num_draft_layers=3,
    dspark_block_size=5,
    dspark_markov_rank=128,
    dspark_noise_token_id=255,
    dspark_target_layer_ids=(0, 1, 2),
)


def test_draft_layers_are_loaded_where_they_fit_beside_all_experts() -> None:
    nodes: Any = planned_nodes(plan_store(DRAFTING, draft=DraftKind.DSPARK), "drafting")
    needs = needs_of(nodes, 200)
    plain = needs_of(planned_nodes(plan_store(SMALL), "plain"), 200)
    record, engines = (
        needs.experts.record_nbytes,
        [engine.session_sizes(DRAFTING, 1, 200, drafts=n).nbytes for n in (0, 3)],
    )
    arrays = [one for path, one in nodes.hierarchy.arrays.items() if path.startswith("mtp/")]
    weights = sum(one.nbytes for one in arrays if "lineage" not in one.path)
    assert 0 <= needs.draft - weights - (engines[1] - engines[0]) < 4096 * len(arrays)
    assert needs.draft > 3 * 8 * record and needs.whole == plain.whole and plain.draft == 0
    every: Any = SimpleNamespace(function=lambda kernel: kernel)

    def said(free: int, experts: Experts = "auto") -> str | None:
        found = fit(needs, machines.KNOWN[0], free=free, experts=experts)
        placed = plan_experts_of(nodes, free, experts)
        stages, reason = load.plan_drafts(nodes, placed, free, 1, 200, every)
        assert found.without_drafts == reason and stages == (0 if reason else 3)
        return reason

    assert said(needs.whole + needs.draft) is None
    assert "they need" in str(said(needs.whole + needs.draft - 1))
    assert "over the bus" in str(said(needs.whole - 1))
    assert "over the bus" in str(said(10**12, 17 * record))

    def missing(kernel: Any) -> None:
        raise KernelError(f"{kernel.name} is missing")

    every.function = missing
    placed = Placement.resident(3, 8)
    assert "is missing" in str(load.plan_drafts(nodes, placed, 10**12, 1, 200, every)[1])


def plan_experts_of(nodes: Any, free: int, experts: Experts) -> Placement:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "free_memory", lambda device: (free, "the GPU"))
        return plan_experts(nodes, CPU, experts, None, 1, 200)


def test_mtp_is_left_out() -> None:
    config = dataclasses.replace(SMALL, num_draft_layers=1)
    nodes = planned_nodes(plan_store(config, draft=DraftKind.MTP), "mtp")
    found = fit(needs_of(nodes, 200), machines.KNOWN[0], free=10**12)
    assert found.fits and found.needs.draft > 0
    assert "MTP is not run by the GPU's kernels yet" in str(found.without_drafts)
