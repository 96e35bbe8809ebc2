"""Draft layers of a store, as they are loaded: on emulated kernels, beside the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.cuda_driver import Driver
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.load import damage
from dsv4.runtime.gpu.operands import parts, read_model
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.rehearsal import all_kernels, outlined_model
from dsv4.runtime.gpu.standard import standard_model
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import EVERYTHING, Settings, load_weights
from dsv4.runtime.load.outline import OutlinedWeights
from dsv4.runtime.load.placement import Placement
from dsv4.runtime.load.records import load_records
from dsv4.runtime.model import load
from dsv4.synthetic.store import make_store
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.runtime.test_fit import DRAFTING
from tests.support.emulator import Emulator

BLOCK = DRAFTING.dspark_block_size or 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    place = tmp_path_factory.mktemp("drafting") / "packed"
    make_store(place, DRAFTING, draft=DraftKind.DSPARK)
    return PackedStore.open(place)


@pytest.fixture(scope="module")
def loaded(store: PackedStore) -> Loaded:
    placement = Placement.resident(3, 8).with_resident(DRAFTING.num_draft_layers)
    records = load_records(store, placement, CPU, Settings(), Driver)
    memory = ExpertMemory.make(placement, records.device, records.host, 0)
    return Loaded(load_weights(store, "cpu", parts=EVERYTHING, records=True), memory)


def test_a_loaded_store_proposes(
    store: PackedStore, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.config.dspark_target_layer_ids == DRAFTING.dspark_target_layer_ids
    monkeypatch.setattr(Program, "replay", Program.launch)
    session = HostModel(loaded, Emulator(store.config), CPU, drafts=True).session(32, chunk=0)
    ids = torch.tensor([7])
    session.forward(ids)
    found = session.propose(5, BLOCK)
    exact, rounded = (
        load(store, dtype=dtype, numerics=Numerics.CACHES, draft=DraftKind.DSPARK).session(32)
        for dtype in (torch.float32, torch.bfloat16)
    )
    drafts = []
    for one in (exact, rounded):
        one.forward(ids)
        drafts.append(one.propose(5, BLOCK).logits)
    errors = [
        float((one - drafts[0]).square().mean().sqrt() / drafts[0].std())
        for one in (found.logits, drafts[1])
    ]
    assert errors[0] < max(2 * errors[1], 0.02)


def test_an_outline_is_what_is_loaded(store: PackedStore, loaded: Loaded) -> None:
    one = read_model(loaded, drafts=True).draft
    other = read_model(Loaded(OutlinedWeights(store)), drafts=True).draft
    assert one is not None and other is not None
    pairs = list(zip(parts(one, torch.Tensor), parts(other, torch.Tensor), strict=True))
    for mine, theirs in pairs:
        assert (mine.shape[1:], mine.dtype) == (theirs.shape[1:], theirs.dtype)
    assert len(pairs) > 60


def test_an_empty_markov_head_is_damage(loaded: Loaded) -> None:
    draft = read_model(loaded, drafts=True).draft
    assert draft is not None and damage(draft) is None
    empty = dataclasses.replace(draft, markov_w1=torch.zeros_like(draft.markov_w1))
    assert "markov_w1 holds nothing but zeros" in str(damage(empty))
    codes = dataclasses.replace(draft.markov_w2, codes=torch.zeros_like(draft.markov_w2.codes))
    empty = dataclasses.replace(draft, markov_w2=codes)
    assert "markov_w2 holds nothing but zeros" in str(damage(empty))


def test_kernels_are_those_of_the_configuration(store: PackedStore) -> None:
    wanted = {one.name for one in all_kernels(standard_model(store.config))}
    assert {one.name for one in all_kernels(outlined_model(store, drafts=True))} == wanted
    assert {one.name for one in all_kernels(outlined_model(store))} < wanted


def test_a_store_whose_config_json_says_nothing_of_drafts(store: PackedStore) -> None:
    (store.root / "assets" / "config.json").unlink()
    damaged = PackedStore.open(store.root, check_files=False)
    with pytest.raises(RuntimeRefusal, match="does not have all of dspark_block_size"):
        outlined_model(damaged, drafts=True)
    outlined_model(damaged)
