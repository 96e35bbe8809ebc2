"""DSpark on the GPU's plan proposes what the CPU's drafter does, and leaves no trace.

The judge of numbers is the reference in float32, which is compared with DeepSeek's own code
(`tests/runtime/test_dspark.py`); that of histories another session, which never had them.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.releases import DRAFTING, FLASH
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu import caches
from dsv4.runtime.gpu.draft_plan import Observed, Proposal, refuse_sizes
from dsv4.runtime.gpu.plan import Pass
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.rehearsal import all_kernels, chunk_kernels, proposal_kernels, step_kernels
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.gpu.standard import standard_model
from dsv4.runtime.model import load
from dsv4.runtime.session import SequenceBase
from dsv4.runtime.snapshots import gpu_memory
from dsv4.runtime.text.drafting import drafter
from dsv4.runtime.text.generate import Timings, generate
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.gpu.test_rewind import Quick
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator

CONFIG = dataclasses.replace(
    SMALL,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 8),
    num_hash_layers=0,
    n_routed_experts=2,
    sliding_window=64,
    num_draft_layers=3,
    dspark_block_size=5,
    dspark_markov_rank=128,
    dspark_noise_token_id=255,
    dspark_target_layer_ids=(0, 1, 2),
)
"""All experts are chosen, so that no rounding chooses others. With its own rows a block sees two
tiles of rows, as it does in a real model."""
BLOCK = 5
CAPACITY = 192
IDS = torch.randint(0, CONFIG.vocab_size, (CAPACITY,), generator=torch.Generator().manual_seed(3))
OTHER = IDS.flip(0)
WRONG = 0.1  # of the logits' deviation; what is right is off by a few hundredths


pytestmark = pytest.mark.usefixtures("no_graphs")


@functools.cache
def weights(config: ModelConfig = CONFIG) -> RandomWeights:
    return RandomWeights(config, CPU)


@functools.cache
def quick_model(*, drafts: bool = True) -> HostModel:
    return HostModel(weights(), Quick(CONFIG), CPU, drafts=drafts)


def fed(count: int, *, chunk: int = 0) -> GpuSession:
    """A quick session that has read the first `count` ids."""
    session = quick_model().session(CAPACITY, chunk=chunk)
    session.forward(IDS[:count], "last")
    return session


def equal(one: Draft, other: Draft) -> bool:
    assert one.confidence is not None and other.confidence is not None
    pairs = ((one.ids, other.ids), (one.logits, other.logits), (one.confidence, other.confidence))
    return all(torch.equal(a, b) for a, b in pairs)


ENDS = {0: (1, 4), 32: (32, 78, 136)}
"""By length of chunks, where proposals are compared: at the beginning; after a chunk, with steps
behind it where the window is full, and when rings have wrapped."""

Drafts = dict[int, Draft]
"""By position."""


@functools.cache
def references(dtype: torch.dtype) -> Drafts:
    """Proposals of the CPU's drafter, exact or rounded to bfloat16."""
    model = load(weights(), dtype=dtype, numerics=Numerics.CACHES, draft=DraftKind.DSPARK)
    return drafted(model.session(CAPACITY), sorted({one for ends in ENDS.values() for one in ends}))


def drafted(session: SequenceBase, ends: Sequence[int]) -> Drafts:
    found = {}
    for end in ends:
        session.forward(IDS[session.position : end], "last")
        found[end] = session.propose(int(IDS[end]), BLOCK)
    return found


def proposals(chunk: int, ends: Sequence[int]) -> Drafts:
    """Of the GPU's plan."""
    model = HostModel(weights(), Emulator(CONFIG), CPU, drafts=True)
    return drafted(model.session(CAPACITY, chunk=chunk), ends)


def errors(found: Drafts) -> tuple[float, float]:
    """Of logits and of confidence against the exact ones: root mean squares, in deviations of the
    exact ones."""
    exact, parts = references(torch.float32), []
    for name in ("logits", "confidence"):
        mine, wanted = (
            torch.stack([getattr(one[end], name) for end in found]).double()
            for one in (found, exact)
        )
        parts.append(float((mine - wanted).square().mean().sqrt() / wanted.std()))
    return parts[0], parts[1]


@pytest.mark.parametrize("chunk", ENDS)
def test_proposals_are_the_references(chunk: int) -> None:
    """As good as bfloat16 is."""
    found = proposals(chunk, ENDS[chunk])
    own, rounded = errors(found), errors({end: references(torch.bfloat16)[end] for end in found})
    assert all(mine <= 1.5 * theirs for mine, theirs in zip(own, rounded, strict=True))
    assert max(own) < WRONG
    for one, exact in ((found[end], references(torch.float32)[end]) for end in found):
        assert torch.equal(one.ids, one.logits.argmax(-1)) and one.ids.dtype == torch.int64
        second = exact.logits.topk(2).values
        clear = (second[:, 0] - second[:, 1]) > exact.logits.std() / 4
        assert torch.equal(one.ids[:1][clear[:1]], exact.ids[:1][clear[:1]])


place, end_of = Proposal.place, Observed.end


def angles_one_position_on(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Proposal, *at: int) -> None:
        place(self, *at)
        self.tokens.position.add_(1)

    patch.setattr(Proposal, "place", wrong)


def rows_that_see_themselves_last(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Proposal, *at: int) -> None:
        place(self, *at)
        self.block_end.copy_(self.tokens.position)

    patch.setattr(Proposal, "place", wrong)


def angles_of_the_last_row(patch: pytest.MonkeyPatch) -> None:
    """Where outputs are rotated back, as by a kernel with one array of positions."""
    joined = Emulator._attention_join

    def wrong(self: Emulator, given: dict[str, Any], buffers: dict[str, Tensor]) -> Any:
        turn = {"turn": buffers["position"]} if "turn" in buffers else {}
        return joined(self, given, buffers | turn)

    patch.setattr(Emulator, "_attention_join", wrong)


def taps_reversed(patch: pytest.MonkeyPatch) -> None:
    right = Observed.layer

    def wrong(self: Observed, run: Pass, index: int, streams: Tensor) -> None:
        right(self, run, CONFIG.num_hidden_layers - 1 - index, streams)

    patch.setattr(Observed, "layer", wrong)


def newest_row_missing(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Observed, run: Pass, own: Sequence[caches.LayerCaches]) -> None:
        position = run.tokens.position.clone()

        def gone() -> None:
            position.copy_(run.tokens.position)
            position[-1] = -1

        run.between(gone)
        tokens = dataclasses.replace(run.tokens, position=position)
        end_of(self, dataclasses.replace(run, tokens=tokens), own)

    patch.setattr(Observed, "end", wrong)


def noise_of_another_id(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Proposal, "place", lambda self, token, noise, *at: place(self, token, 7, *at))


@pytest.mark.parametrize(
    "mistake",
    [
        angles_one_position_on,
        rows_that_see_themselves_last,
        angles_of_the_last_row,
        taps_reversed,
        newest_row_missing,
        noise_of_another_id,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_shows(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    found = errors(proposals(0, ENDS[0]))
    assert found[0] > WRONG, found


def bytes_of(session: GpuSession) -> list[Tensor]:
    """Of all caches; rings of draft layers without the places of a proposal."""
    engine, found = session.engine, []
    for number, cache in enumerate(engine.buffers.caches):
        for part in (cache.window_kv, cache.window_scales):
            kept = part[session.slot].clone()
            if number >= CONFIG.num_hidden_layers:
                ahead = torch.arange(session.position, session.position + BLOCK)
                kept[ahead % len(kept)] = 0
            found.append(kept)
        for own in (cache.entries, cache.keys):
            if own is not None:
                parts = (own.ring_kv, own.ring_gate, own.entries, own.scales)
                found += [one[session.slot].clone() for one in parts]
    return found


@pytest.mark.parametrize("position", [1, 64, 65, 130])
def test_proposing_leaves_no_trace(position: int) -> None:
    session, plain = fed(position), fed(position)
    before, ids = bytes_of(session), session._ids.clone()
    first = session.propose(11, BLOCK)
    assert session.position == position and torch.equal(session._ids, ids)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(session), before, strict=True))
    assert not equal(session.propose(12, BLOCK), first)
    assert equal(session.propose(11, BLOCK), first)
    for count in range(1, BLOCK):
        fewer = session.propose(11, count)
        assert torch.equal(fewer.ids, first.ids[:count])
        assert torch.equal(fewer.logits, first.logits[:count])
        assert fewer.confidence is not None and first.confidence is not None
        assert torch.equal(fewer.confidence, first.confidence[:count])
    more = IDS[position : position + 9]
    assert torch.equal(session.forward(more), plain.forward(more))
    assert equal(session.propose(3, BLOCK), plain.propose(3, BLOCK))


def test_however_the_sequence_was_cut() -> None:
    whole = fed(100)
    for seed in range(2):
        session, lengths = quick_model().session(CAPACITY, chunk=0), random.Random(seed)
        while session.position < 100:
            length = 1 if seed == 0 else lengths.randint(1, 8)
            session.forward(IDS[session.position : min(session.position + length, 100)], "last")
        assert equal(session.propose(3, BLOCK), whole.propose(3, BLOCK))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_after_any_history_of_acceptance(seed: int) -> None:
    """Rows are verified, some are rejected, and drafts are asked for in between."""
    session, chance = quick_model().session(CAPACITY, chunk=0), random.Random(seed)
    session.forward(IDS[: chance.randint(1, 60)], "last")
    while session.position < 90:
        start, rows = session.position, chance.randint(2, 8)
        accepted = chance.randint(1, rows)
        session.propose(int(IDS[start]), BLOCK)
        session.forward(torch.cat((IDS[start : start + accepted], OTHER[: rows - accepted])))
        session.propose(1, BLOCK)
        session.rewind(start + accepted)
        if chance.random() < 0.2:  # as far as rings reach
            session.rewind(max(1, session._written - session.slack))
    fresh = fed(session.position)
    assert equal(session.propose(5, BLOCK), fresh.propose(5, BLOCK))


@pytest.mark.parametrize(("chunk", "back"), [(0, 8), (0, 9), (40, 40), (40, 41)])
def test_after_going_back(chunk: int, back: int) -> None:
    """As far as rings reach; and farther, where tokens are fed again. A chunk's rows are alike
    whatever it holds, so those before are of the same cuts."""
    start = 80
    session, fresh = fed(start, chunk=chunk), fed(start, chunk=chunk)
    session.forward(OTHER[:back], "last")
    session.propose(1, BLOCK)
    session.rewind(start)
    assert equal(session.propose(5, BLOCK), fresh.propose(5, BLOCK))
    assert torch.equal(session.forward(IDS[start : start + 5]), fresh.forward(IDS[start:][:5]))
    assert equal(session.propose(6, BLOCK), fresh.propose(6, BLOCK))


def test_a_ring_that_is_shorter_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = caches.allocate_caches

    def shorter(config: ModelConfig, *given: Any, drafts: int) -> Any:
        found = right(config, *given, drafts=drafts)
        return tuple(
            dataclasses.replace(
                one,
                window_kv=one.window_kv[:, 1:].clone(),
                window_scales=one.window_scales[:, 1:].clone(),
            )
            if number >= config.num_hidden_layers
            else one
            for number, one in enumerate(found)
        )

    monkeypatch.setattr("dsv4.runtime.gpu.engine.allocate_caches", shorter)
    session = fed(80)
    monkeypatch.undo()
    monkeypatch.setattr(Program, "replay", Program.launch)
    session.forward(OTHER[:8], "last")
    session.propose(1, BLOCK)
    session.rewind(80)
    assert not equal(session.propose(5, BLOCK), fed(80).propose(5, BLOCK))


def test_among_other_sequences() -> None:
    """Slots are not seen by each other, and a step may have rows of several."""
    engine = quick_model().engine(CAPACITY, slots=3, chunk=0)
    sessions = [engine.session() for _ in range(3)]
    texts = (IDS[:70], OTHER[:3], IDS[40:140])
    for turn in range(100):
        for session, text in zip(sessions, texts, strict=True):
            if turn < len(text):
                session.forward(text[turn : turn + 1])
            if turn % 17 == 0:
                session.propose(turn, BLOCK)
    for session, text in zip(sessions, texts, strict=True):
        alone = quick_model().session(CAPACITY, chunk=0)
        alone.forward(text, "last")
        assert equal(session.propose(9, BLOCK), alone.propose(9, BLOCK))


@pytest.mark.parametrize("sampler", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "seed"])
def test_a_text_is_the_same_with_drafts(sampler: dict[str, Any]) -> None:
    """And what is kept of it."""
    plain, session = quick_model().session(CAPACITY), quick_model().session(CAPACITY)
    prompt, timings, own = IDS[:70].tolist(), Timings(), drafter(session, 3)
    assert own is not None
    given = prompt, 30, Sampler(**sampler), ()
    wanted = list(generate(plain, prompt, 30, Sampler(**sampler)))
    assert list(generate(session, *given, timings, drafter=own)) == wanted
    assert timings.drafts is not None and sum(timings.drafts.proposed) >= 30
    assert timings.drafts.proposer == "draft layers" and session.position == plain.position
    assert equal(session.propose(2, BLOCK), plain.propose(2, BLOCK))


def test_a_snapshot_has_the_context() -> None:
    block = 64
    source, target = fed(block), quick_model().session(CAPACITY, chunk=0)
    memories = [
        gpu_memory(CONFIG, one.engine.buffers.caches, one.slot, block) for one in (source, target)
    ]
    state = torch.empty(memories[0].state_bytes, dtype=torch.uint8)
    blocks = torch.empty((1, memories[0].block_bytes), dtype=torch.uint8)
    memories[0].save_state(block, state)
    memories[0].save_blocks(0, blocks)
    target.forward(OTHER[:90], "last")
    target.reset()
    memories[1].load_state(block, state)
    memories[1].load_blocks(0, blocks)
    target._position = target._written = block
    assert equal(target.propose(5, BLOCK), fed(block).propose(5, BLOCK))


def test_without_draft_layers_nothing_of_them_is_launched() -> None:
    plain = quick_model(drafts=False).session(CAPACITY, chunk=0)
    with_drafts = fed(20)
    assert plain.most_drafts == 0 and with_drafts.most_drafts == BLOCK
    assert len(plain.engine.buffers.caches) == CONFIG.num_hidden_layers
    assert torch.equal(plain.forward(IDS[:24])[20:], with_drafts.forward(IDS[20:24]))
    with pytest.raises(RuntimeRefusal, match="no draft layers, or was loaded without them"):
        plain.propose(1, 1)
    without, having = standard_model(FLASH), standard_model(DRAFTING["flash"])
    for kernels, rows in ((step_kernels, 6), (chunk_kernels, 64)):
        before, after = (
            [one.name for one in kernels(model, rows, 1 << 15)] for model in (without, having)
        )
        head = 1 if kernels is step_kernels else 0
        end = len(before) - head
        assert after[:end] == before[:end] and after[len(after) - head :] == before[end:]
        assert len(after) - len(before) == (6 if head else 10)


def test_kernels_of_drafts_are_built() -> None:
    built = {one.name for one in all_kernels(standard_model(DRAFTING["flash"]))}
    launched = {one.name for one in proposal_kernels(standard_model(DRAFTING["flash"]), 1 << 15)}
    assert launched <= built
    assert {one.name for one in all_kernels(standard_model(FLASH))} <= built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dspark_block_size": 9}, "dspark_block_size is 9, .* 1 to 8"),
        ({"dspark_markov_rank": 100}, "dspark_markov_rank is 100, .* multiples of 128"),
        ({"sliding_window": 59}, "sliding_window is 59, .* more than 59"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_sizes_that_no_kernel_takes(change: dict[str, int], message: str) -> None:
    assert refuse_sizes(CONFIG) is None and refuse_sizes(DRAFTING["pro"]) is None
    changed = dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
    refused = refuse_sizes(changed)
    assert refused is not None and re.search(message, refused)
