"""What holds of any drafter: it leaves no trace, follows the sequence wherever it goes, and says
when it cannot."""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
from dsv4.convert.engine import convert
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind
from dsv4.runtime import draft as drafts
from dsv4.runtime.cache import SLACK
from dsv4.runtime.model import Model, load
from dsv4.runtime.session import Session
from dsv4.runtime.snapshots import block_tokens, cpu_memory
from dsv4.synthetic.tiny import TINY_DSPARK
from tests.conftest import MakeSource
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import DSPARK_SMALL, MTP_SMALL, random_ids, random_weights

CONFIGS = {DraftKind.DSPARK: DSPARK_SMALL, DraftKind.MTP: MTP_SMALL}
VOCAB = DSPARK_SMALL.vocab_size
IDS = random_ids(DSPARK_SMALL, 300)
OTHER = IDS.flip(0)
both = pytest.mark.parametrize("kind", CONFIGS, ids=str)


@functools.cache
def model(kind: DraftKind, dtype: torch.dtype = torch.float32) -> Model:
    config = CONFIGS.get(kind, DSPARK_SMALL)
    return load(InMemoryWeights(config, random_weights(config, 0, kind)), dtype=dtype, draft=kind)


def fed(kind: DraftKind, count: int) -> Session:
    """A session that has read the first `count` ids at once."""
    session = model(kind).session(320)
    session.forward(IDS[:count], "last")
    return session


def visible(session: Session) -> list[Tensor]:
    """What of the context the next proposal reads."""
    at = session.position
    if len(session.context) == 2:  # MTP: keys up to the token before the last, and its streams
        keys, streams = session.context
        return [keys.last(keys.window - 1, at - 1), streams.last(1, at)]
    return [ring.last(ring.window, at) for ring in session.context]


def memory(session: Session) -> list[Tensor]:
    """All that a session keeps, as bytes."""
    found = [session._ids, *(ring.ring for ring in session.context)]
    for cache in session.caches:
        found.append(cache.window.ring)
        for part in (cache.compressed, cache.index_keys):
            found += [] if part is None else [part.entries, part.ring_kv, part.ring_gate]
    return [part.clone().view(torch.uint8) for part in found]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def equal(one: drafts.Draft, other: drafts.Draft) -> bool:
    parts = [
        (getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(drafts.Draft)
    ]
    return all(a is b is None or torch.equal(a, b) for a, b in parts)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(kind: DraftKind, dtype: torch.dtype) -> None:
    session = model(kind, dtype).session(64)
    session.forward(IDS[:20])
    most = session.most_drafts
    found = session.propose(7, most)
    assert found.ids.dtype == torch.int64
    assert found.ids.shape == (most,)
    assert found.logits.dtype == torch.float32
    assert found.logits.shape == (most, VOCAB)
    assert torch.equal(found.ids, found.logits.argmax(-1))
    if kind is DraftKind.MTP:
        assert (found.confidence, most) == (None, 3)
        return
    assert most == DSPARK_SMALL.dspark_block_size
    assert found.confidence is not None
    assert found.confidence.dtype == torch.float32
    chance = found.confidence.sigmoid()
    assert chance.shape == (most,)
    assert ((chance > 0) & (chance < 1)).all()


@both
@pytest.mark.parametrize("position", [1, 2, 15, 16, 17, 130])
def test_proposing_leaves_no_trace(kind: DraftKind, position: int) -> None:
    session = fed(kind, position)
    before, most = memory(session), session.most_drafts
    first = session.propose(11, most)
    assert session.position == position
    assert same(memory(session), before)
    assert equal(session.propose(11, most), first)
    for count in range(1, most):
        fewer = session.propose(11, count)
        assert torch.equal(fewer.ids, first.ids[:count])
        assert torch.equal(fewer.logits, first.logits[:count])
        if fewer.confidence is not None and first.confidence is not None:
            assert torch.equal(fewer.confidence, first.confidence[:count])


@both
def test_the_model_computes_what_it_does_without_draft_layers(kind: DraftKind) -> None:
    plain = model(DraftKind.NONE).session(320)
    session = model(kind).session(320)
    for start in range(0, 60, 3):
        part = IDS[start : start + 3]
        assert torch.equal(session.forward(part), plain.forward(part))
        session.propose(1, session.most_drafts)
    assert plain.context == ()


@both
def test_however_the_sequence_was_cut(kind: DraftKind) -> None:
    """A pass longer than the rings, tokens one by one, and parts of all lengths."""
    whole = fed(kind, 140)
    for seed in range(2):
        session, lengths = model(kind).session(320), random.Random(seed)
        while session.position < 140:
            length = 1 if seed == 0 else lengths.randint(1, 100)
            session.forward(IDS[session.position : min(session.position + length, 140)], "last")
        assert same(visible(session), visible(whole))
        assert equal(session.propose(3, session.most_drafts), whole.propose(3, whole.most_drafts))


@both
@pytest.mark.parametrize("seed", range(2))
def test_after_any_history_of_acceptance(kind: DraftKind, seed: int) -> None:
    """Rows are verified, some are rejected: the context is that of the tokens that remain."""
    session, chance = model(kind).session(320), random.Random(seed)
    session.forward(IDS[: chance.randint(1, 40)], "last")
    while session.position < 90:
        start, rows = session.position, chance.randint(2, 8)
        accepted = chance.randint(1, rows)
        block = torch.cat((IDS[start : start + accepted], OTHER[: rows - accepted]))
        session.forward(block)
        session.rewind(start + accepted)
        if chance.random() < 0.1:  # and farther back: the last turn is edited
            session.rewind(max(1, session.position - chance.randint(0, SLACK - rows)))
    fresh = fed(kind, session.position)
    assert same(visible(session), visible(fresh))
    assert equal(session.propose(5, session.most_drafts), fresh.propose(5, fresh.most_drafts))


@both
@pytest.mark.parametrize("back", [SLACK, SLACK + 1, 3 * SLACK], ids=str)
def test_after_going_back(kind: DraftKind, back: int) -> None:
    """As far as rings reach; and farther, where tokens are fed again."""
    session = fed(kind, 60)
    session.forward(OTHER[:back], "last")
    session.rewind(60)
    fresh = fed(kind, 60)
    assert same(visible(session), visible(fresh))
    assert equal(session.propose(5, 3), fresh.propose(5, 3))


@both
def test_a_ring_that_is_shorter_shows(kind: DraftKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "SLACK", SLACK - 2)
    session = fed(kind, 60)
    session.forward(OTHER[:SLACK], "last")
    session.rewind(60)
    assert not same(visible(session), visible(fed(kind, 60)))


@both
def test_after_a_reset(kind: DraftKind) -> None:
    session = fed(kind, 100)
    session.reset()
    with pytest.raises(RuntimeRefusal, match="before the first token"):
        session.propose(1, 1)
    session.forward(IDS[:30], "last")
    assert equal(session.propose(5, 3), fed(kind, 30).propose(5, 3))


@both
@pytest.mark.parametrize("kept", [True, False], ids=["with its context", "without"])
def test_a_snapshot_has_the_context(kind: DraftKind, kept: bool) -> None:
    config = CONFIGS[kind]
    block = block_tokens(config)
    source, target = fed(kind, block), model(kind).session(320)
    memories = [
        cpu_memory(config, one.caches, block, one.context if kept else ())
        for one in (source, target)
    ]
    state = torch.empty(memories[0].state_bytes, dtype=torch.uint8)
    blocks = torch.empty((1, memories[0].block_bytes), dtype=torch.uint8)
    source.forward(OTHER[:20], "last")  # the state is saved later, from rings
    memories[0].save_state(block, state)
    memories[0].save_blocks(0, blocks)
    target.forward(OTHER[:200], "last")
    target.reset()
    memories[1].load_state(block, state)
    memories[1].load_blocks(0, blocks)
    target.skip_to(block)
    fresh = fed(kind, block)
    assert equal(target.propose(5, 3), fresh.propose(5, 3)) is kept
    more = IDS[block : block + 30]
    assert torch.equal(target.forward(more), fresh.forward(more))
    if kept:
        assert equal(target.propose(5, 3), fresh.propose(5, 3))


@both
def test_near_the_end_of_the_room(kind: DraftKind) -> None:
    """What a draft looks ahead is not what it needs room for."""
    roomy, session = fed(kind, 30), model(kind).session(32)
    session.forward(IDS[:30], "last")
    assert equal(session.propose(5, 1), roomy.propose(5, 1))
    with pytest.raises(RuntimeRefusal, match="3 tokens after the 30 already in the session"):
        session.propose(5, 2)


@both
def test_refusals(kind: DraftKind) -> None:
    session = fed(kind, 30)
    most = session.most_drafts
    for count in (0, -1, most + 1):
        with pytest.raises(RuntimeRefusal, match=f"{count} proposals were asked .* 1 to {most}"):
            session.propose(5, count)
    for token in (-1, VOCAB):
        with pytest.raises(RuntimeRefusal, match=f"token id {token} is not in the vocabulary"):
            session.propose(token, 1)
    with pytest.raises(RuntimeRefusal, match="before the first token: feed the prompt first"):
        model(kind).session(64).propose(5, 1)


def test_without_draft_layers() -> None:
    session = model(DraftKind.NONE).session(64)
    session.forward(IDS[:5])
    assert session.most_drafts == 0
    with pytest.raises(RuntimeRefusal, match="no draft layers, or was loaded without them"):
        session.propose(5, 1)


@pytest.mark.parametrize("strange", ["a", None, torch.tensor([5, 6]), 2.0, True, 1.5], ids=repr)
def test_what_is_no_whole_number_is_named(strange: Any) -> None:
    session = fed(DraftKind.MTP, 10)
    with pytest.raises(RuntimeRefusal, match=r"token is .*, expected a whole number"):
        session.propose(strange, 1)
    with pytest.raises(RuntimeRefusal, match=r"count is .*, expected a whole number"):
        session.propose(5, strange)
    with pytest.raises(RuntimeRefusal, match=f"token id {1 << 70} is not in the vocabulary"):
        session.propose(1 << 70, 1)


@both
def test_an_interrupted_session_proposes_nothing(
    kind: DraftKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = fed(kind, 30)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model(kind).drafter), "observe", interrupt)
        session.forward(OTHER[:10])
    with pytest.raises(RuntimeRefusal, match="was interrupted"):
        session.propose(5, 1)
    session.rewind(30)
    assert equal(session.propose(5, 3), fed(kind, 30).propose(5, 3))


@both
@pytest.mark.parametrize(
    ("damage", "what"),
    [(float("nan"), "logits that are not finite"), (0.0, "token 0 whatever is asked")],
    ids=["NaN", "zeros"],
)
def test_layers_that_cannot_draft_are_refused(kind: DraftKind, damage: float, what: str) -> None:
    config = CONFIGS[kind]
    weights = random_weights(config, 0, kind)
    norm = f"mtp.{config.num_draft_layers - 1}.norm.weight"
    weights[norm] = torch.full_like(weights[norm], damage)
    if kind is DraftKind.DSPARK and not damage:  # a bias that always says the same
        name = "mtp.2.markov_head.markov_w"
        weights[f"{name}1.weight"] = torch.ones_like(weights[f"{name}1.weight"])
        weights[f"{name}2.weight"] = torch.zeros_like(weights[f"{name}2.weight"])
        weights[f"{name}2.weight"][0] = 1
    with pytest.raises(RuntimeRefusal, match=rf"\(mtp\.\*\) propose {what}.*--draft off"):
        load(InMemoryWeights(config, weights), draft=kind)
    load(InMemoryWeights(config, weights))


@pytest.fixture(scope="module")
def dspark_store(make_source: MakeSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dspark") / "packed"
    convert(make_source(TINY_DSPARK, DraftKind.DSPARK), out, recipe="native")
    return out


def test_a_store_proposes(dspark_store: Path) -> None:
    packed = dsv4.open(dspark_store)
    assert packed.config.dspark_target_layer_ids == (3, 4, 5)
    assert packed.config.dspark_noise_token_id is not None
    session = dsv4.load(packed).session(64)
    session.forward(IDS[:20])
    assert session.propose(5, 5).ids.shape == (5,)
    without = dsv4.load(packed, drafts=False).session(64)
    without.forward(IDS[:20])
    assert without.most_drafts == 0


def test_the_record_of_a_store_is_what_it_was(dspark_store: Path) -> None:
    """The root of a store does not depend on what config.json says besides."""
    record = dsv4.open(dspark_store).store.manifest["config"]
    assert not {"dspark_noise_token_id", "dspark_target_layer_ids"} & record.keys()
    assert record["dspark_block_size"] == 5


@pytest.mark.parametrize("text", [None, "{", "[]", '{"dspark_noise_token_id": 99999}'], ids=str)
def test_a_store_whose_config_json_is_damaged_opens(
    dspark_store: Path, tmp_path: Path, text: str | None
) -> None:
    """Its size is not looked at, as when a store is examined for damage."""
    shutil.copytree(dspark_store, tmp_path / "packed")
    asset = tmp_path / "packed" / "assets" / "config.json"
    asset.unlink()
    if text is not None:
        asset.write_text(text)
    store = dsv4.open(dspark_store).store.open(tmp_path / "packed", check_files=False)
    assert store.config.dspark_noise_token_id is None
    with pytest.raises(RuntimeRefusal, match=r"assets/config\.json"):
        load(store, draft=store.contents.draft)
    load(store)
