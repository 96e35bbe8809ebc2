"""With drafts everybody is told what he is told without, and slots hold what was said.

Drafts come from a proposer that knows the answers, and is wrong by lot, unless a test says else.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind
from dsv4.runtime.model import Model
from dsv4.runtime.text.drafting import Proposal, Wish
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve import drafts as serve_drafts
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.drafts import CHANCE, Drafting, Guesser
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.jobs import Event, Finish, Job
from dsv4.serve.remembering import Remembering
from dsv4.serve.run import Run, Slot
from dsv4.serve.scheduler import Scheduler
from tests.runtime import test_draft
from tests.serve import small
from tests.serve.harness import Heard, ask, job
from tests.serve.small import IDS, alone
from tests.serve.test_engine import SAMPLERS, Alternating, prompt
from tests.support.scripted import Script, ScriptedModel, sums

COUNT = 16


class Knowing:
    """Knows what follows, and is wrong in some of its drafts; says so many as it likes."""

    def __init__(self, wholes: Sequence[Sequence[int]], share: float, seed: int = 0) -> None:
        self.wholes, self.share, self.lot = wholes, share, random.Random(seed)
        self.asked = 0

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        self.asked += 1
        known = [whole for whole in self.wholes if list(whole[: len(ids)]) == list(ids)]
        following = known[0][len(ids) :][: self.lot.randint(0, count)] if known else []
        right = [self.lot.random() < self.share for _ in following]
        return Proposal(
            [one if well else (one + 1) % 64 for one, well in zip(following, right, strict=True)]
        )


@pytest.fixture
def knowing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def know(wholes: Sequence[Sequence[int]], share: float = 0.8) -> None:
        one = Knowing(wholes, share)
        monkeypatch.setattr(serve_drafts, "PromptLookup", lambda: one)

    return know


def wholes() -> list[list[int]]:
    return [
        prompt(number) + alone(prompt(number), COUNT + 4, SAMPLERS[(number + round_) % 6])[0]
        for number in range(9)
        for round_ in range(2)
    ]


def consistent(engine: ServeEngine) -> bool:
    """Whether each slot's session holds the tokens that the scheduler believes it to hold."""
    backend = engine.backend
    assert isinstance(backend, CpuBackend)
    return all(
        slot.position == session.position
        and slot.tokens[: slot.position][-6:] == session._ids[: session.position].tolist()[-6:]
        for slot, session in zip(engine._scheduler.slots, backend.sessions, strict=True)
    )


def mismatches(wish: Wish, sequences: int, slots: int, seed: int = 0) -> list[int]:
    """As in `test_engine`, with jobs of all kinds: every third one is never drafted for."""
    chance = random.Random(seed)
    engine = ServeEngine(small.backend(slots), Options(queue=100, draft=wish))
    heard: list[tuple[int, int, Heard]] = []
    for round_ in range(2):
        for number in range(sequences):
            kind = (number + round_) % 6
            told = 2 if number % 3 == 2 else None
            one = job(prompt(number), COUNT - number, Sampler(**SAMPLERS[kind]), logprobs=told)
            heard.append((number, kind, ask(engine, one)))
            if chance.random() < 0.2:
                chance.choice(heard)[2].ticket.cancel()  # type: ignore[union-attr]
            if chance.random() < 0.3:
                heard[chance.randrange(len(heard))][2].wait()
    engine.close(finish=True)
    assert consistent(engine)
    found = engine.stats()
    assert (found.running, found.waiting, found.reading) == (0, 0, 0)
    if wish not in ("off", "auto") and slots < 8:
        assert found.draft_tokens > found.right_drafts > 0
        assert sum(found.right_at) == found.right_drafts
        assert found.drafted >= found.right_at[0] >= found.right_at[-1]
    if wish == "off":
        assert found.drafted == 0
    return [
        index
        for index, (number, kind, one_heard) in enumerate(heard)
        if one_heard.tokens != alone(prompt(number), len(one_heard.tokens), SAMPLERS[kind])[0]
    ]


@pytest.mark.parametrize(
    ("wish", "sequences", "slots"),
    [("off", 3, 3), ("auto", 4, 3), (7, 1, 1), (3, 2, 2), (5, 5, 3), (7, 7, 6), (2, 9, 8)],
)
def test_alone_is_as_among_others(
    knowing: Callable[..., None], wish: Wish, sequences: int, slots: int
) -> None:
    knowing(wholes())
    assert mismatches(wish, sequences, slots) == []


@pytest.mark.long
@pytest.mark.parametrize("wish", ["auto", *range(1, 8)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_any_number_of_drafts(knowing: Callable[..., None], wish: Wish, share: float) -> None:
    knowing(wholes(), share)
    found: list[list[int]] = []
    for sequences in range(1, 10):
        engine = ServeEngine(small.backend(5), Options(queue=100, draft=wish))
        heard = [
            ask(engine, job(prompt(number), COUNT, Sampler(**SAMPLERS[number % 6])))
            for number in range(sequences)
        ]
        engine.close(finish=True)
        assert consistent(engine)
        found += [
            one.tokens
            for number, one in enumerate(heard)
            if one.tokens != alone(prompt(number), COUNT, SAMPLERS[number % 6])[0]
        ]
    assert found == []


def _one_too_many(patch: pytest.MonkeyPatch) -> None:
    """Is accepted: the row behind a draft that was wrong stays in the caches."""
    right = type(small.backend(1).sessions[0]).rewind

    def wrong(self: Any, position: int) -> None:
        right(self, min(position + 1, self.position))

    patch.setattr(type(small.backend(1).sessions[0]), "rewind", wrong)


def _a_draft_is_told(patch: pytest.MonkeyPatch) -> None:
    """Though something else was drawn."""
    right = CpuBackend._draw

    def wrong(self: CpuBackend, slot: int, rows: Any, drafts: Sequence[int], draw: Any) -> Any:
        found = right(self, slot, rows, drafts, draw)
        if len(found) <= len(drafts):
            found[-1] = (drafts[len(found) - 1], None)
        return found

    patch.setattr(CpuBackend, "_draw", wrong)


def _counter_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Every row of a step is drawn, and counted, though some are forgotten."""
    right = CpuBackend._draw

    def wrong(self: CpuBackend, slot: int, rows: Any, drafts: Sequence[int], draw: Any) -> Any:
        found = right(self, slot, rows, drafts, draw)
        if draw is not None:
            draw.sampler.drawn += len(rows) - len(found)
        return found

    patch.setattr(CpuBackend, "_draw", wrong)


def _next_token_of_a_wrong_row(patch: pytest.MonkeyPatch) -> None:
    """What goes on is the draw of the first row."""
    right = CpuBackend._draw

    def wrong(self: CpuBackend, slot: int, rows: Any, drafts: Sequence[int], draw: Any) -> Any:
        found = right(self, slot, rows, drafts, draw)
        self._next[slot] = found[0][0]
        return found

    patch.setattr(CpuBackend, "_draw", wrong)


@pytest.mark.parametrize(
    "plant",
    [_one_too_many, _a_draft_is_told, _counter_off_by_one, _next_token_of_a_wrong_row],
    ids=lambda plant: plant.__name__.strip("_").replace("_", " "),
)
def test_a_planted_fault_is_noticed(
    monkeypatch: pytest.MonkeyPatch, knowing: Callable[..., None], plant: Any
) -> None:
    knowing(wholes(), 0.5)
    plant(monkeypatch)
    try:
        wrong = mismatches(4, 3, 2)
    except AssertionError:  # what slots hold is not what was said
        wrong = [-1]
    assert wrong


def repeating(period: int) -> Script:
    """Says again what was said so many tokens ago."""
    return lambda tokens: tokens[-period]


def scripted(script: Script, slots: int = 1, draft: Wish = 4, **more: Any) -> ServeEngine:
    model = ScriptedModel(script, **more)
    return ServeEngine(CpuBackend(model, slots, 512), Options(draft=draft, prefix_bytes=0))


def test_a_text_that_repeats_itself_takes_fewer_steps() -> None:
    """A lookup finds it: of each step the token and four drafts, all of them right."""
    ran: list[int] = []
    engine = scripted(repeating(5), ran=ran.append)
    heard = ask(engine, job([1, 2, 3, 4, 5] * 2, 41)).wait()
    engine.close(finish=True)
    assert heard.tokens == ([1, 2, 3, 4, 5] * 9)[:41]
    assert ran == [10] + [5] * 8
    found = engine.stats()
    assert (found.drafted, found.draft_tokens, found.right_drafts) == (8, 32, 32)
    assert found.right_at == (8, 8, 8, 8, 0, 0, 0)
    assert (found.steps, found.rows, found.generated_tokens) == (8, 40, 41)


def test_the_last_tokens_are_not_run_for_nothing() -> None:
    """Not beyond the limit of an answer, nor beyond the slot, nor beyond a stop."""
    ran: list[int] = []
    engine = scripted(repeating(5), ran=ran.append)
    period = [1, 2, 3, 4, 5]
    assert ask(engine, job(period * 2, 8)).wait().tokens == [1, 2, 3, 4, 5, 1, 2, 3]
    assert ran == [10, 5, 2]
    stopped = ask(engine, job([*period, *period, 1], 30, stop_ids=frozenset({5}))).wait()
    assert (stopped.tokens, stopped.finish) == ([2, 3, 4], Finish.STOP)
    assert consistent(engine)
    full = ask(engine, job(period * 101, 100)).wait()
    assert (full.tokens, full.finish) == (([1, 2, 3, 4, 5] * 2)[:7], Finish.LENGTH)
    engine.close(finish=True)


def test_one_who_is_cancelled_inside_accepted_drafts_is_told_no_more() -> None:
    engine = scripted(repeating(5), slots=2)
    heard = Heard()

    def listen(event: Event) -> None:
        heard(event)
        if len(heard.tokens) == 3 and event.finish is None:
            heard.ticket.cancel()  # type: ignore[union-attr]

    heard.ticket = engine.submit(job([1, 2, 3, 4, 5] * 2, 100), listen)
    assert heard.wait().finish is Finish.CANCELLED and heard.tokens == [1, 2, 3]
    following = ask(engine, job([1, 2, 3, 4, 5] * 3, 12)).wait()
    assert following.tokens == ([1, 2, 3, 4, 5] * 3)[:12] and following.cached >= 13
    engine.close(finish=True)
    assert consistent(engine) and engine.stats().running == 0


def test_logits_that_are_not_finite_behind_a_right_draft() -> None:
    """Fail the job after the tokens before them, and what its slot holds is not gone on from."""

    def script(tokens: Sequence[int]) -> int:
        return tokens[-5] if len(tokens) < 14 else -1

    engine = scripted(script)
    broken = ask(engine, job([1, 2, 3, 4, 5] * 2, 30)).wait()
    assert (broken.tokens, broken.finish) == ([1, 2, 3, 4], Finish.FAILED)
    again = ask(engine, job([1, 2, 3, 4, 5] * 2, 4)).wait()
    assert (again.tokens, again.cached) == ([1, 2, 3, 4], 0)
    engine.close(finish=True)


@pytest.mark.parametrize("draft", ["auto", 7])
def test_many_jobs_on_a_script(draft: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer its own, whatever is drafted; steps never have more rows than they may."""
    script = sums(32)
    most: list[int] = []
    right = CpuBackend.forward

    def forward(self: CpuBackend, slots: Sequence[int], drafts: Any = ()) -> None:
        most.append(len(slots) + sum(map(len, drafts)))
        right(self, slots, drafts)

    monkeypatch.setattr(CpuBackend, "forward", forward)
    proposer = Scripted(script)
    monkeypatch.setattr(serve_drafts, "PromptLookup", lambda: proposer)
    engine = ServeEngine(CpuBackend(ScriptedModel(script), 8, 512), Options(1000, 0, draft=draft))
    lot = random.Random(2)
    heard = []
    for _ in range(120):
        ids = [lot.randrange(32) for _ in range(lot.randint(1, 30))]
        one = job(ids, lot.randint(1, 24), Sampler(lot.choice([0.0, 0.01]), seed=1))
        heard.append((one, ask(engine, one)))
        if lot.random() < 0.2:
            lot.choice(heard)[1].ticket.cancel()  # type: ignore[union-attr]
        if lot.random() < 0.4:
            lot.choice(heard)[1].wait()
    engine.close(finish=True)
    for one, told in heard:
        tokens = list(one.ids)
        for _ in told.tokens:
            tokens.append(script(tokens))
        assert tokens[len(one.ids) :] == told.tokens
    assert max(most) <= 8 and consistent(engine)
    found = engine.stats()
    assert (found.running, found.waiting, found.reading) == (0, 0, 0)
    assert found.rows == sum(most)


@dataclasses.dataclass
class Scripted:
    """Right in three drafts of four."""

    script: Script
    lot: random.Random = dataclasses.field(default_factory=lambda: random.Random(4))

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(self.script(tokens))
        found = tokens[len(ids) :]
        return Proposal([one if self.lot.random() < 0.75 else 0 for one in found])


def test_nothing_is_drafted_where_answers_need_every_row() -> None:
    engine = scripted(repeating(5), slots=9, draft=7)
    many = [ask(engine, job([1, 2, 3, 4, 5] * 2, 200)) for _ in range(9)]
    while not all(one.events for one in many):
        pass  # some answer already, and have rows to spare
    before = engine.stats().drafted
    while min(len(one.tokens) for one in many) < 150:
        assert engine.stats().drafted == before
    engine.close(finish=False)


class Fixed:
    """Says the same again and again, with how sure it is."""

    def __init__(self, ids: list[int], confidence: list[float] | None) -> None:
        self.proposal = Proposal(ids, confidence)

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        sure = self.proposal.confidence
        return Proposal(self.proposal.ids[:count], None if sure is None else sure[:count])


def running(limit: int = 100, slot: int = 0, **more: Any) -> Run:
    run = Run(Job([1, 2], Sampler(), limit, **more), print, 500, lambda: None)
    run.slot = Slot(slot, [1, 2])
    return run


def test_rows_go_to_the_likeliest_drafts() -> None:
    drafting = Drafting(CpuBackend(ScriptedModel(sums(64)), 4, 100), 7)
    sure, silent = Fixed([1, 2, 3, 4, 5, 6, 7], [0.9] * 7), Fixed([], None)
    unsure = Fixed([8, 9], [0.6, 0.99])
    drafting.guessers[:3] = Guesser(sure), Guesser(unsure), Guesser(silent)
    # Chances: .9 .81 .73 .66 .59 .53 .48, and .6 .594; five rows are left of eight.
    runs = [running(slot=slot) for slot in range(4)]
    assert drafting.share(runs[:3]).drafts == [[1, 2, 3, 4], [8], []]
    assert drafting.share(runs[3:]).drafts == [[]], "it has none"
    assert drafting.share([running(limit=3)]).drafts == [[1, 2]]
    assert drafting.share([running(stop_ids=frozenset({3}))]).drafts == [[1, 2]]
    assert not drafting.share([runs[0]] * 8) and not drafting.share([])


def test_a_guesser_learns_how_often_it_is_right() -> None:
    guesser = Guesser(Fixed([1, 2, 3], None))
    assert [chance for _, chance in guesser.propose([1], 3)] == [0.5, 0.25, 0.125]
    guesser.ran(3, 3)
    high = guesser.chance
    assert high > 0.75
    guesser.ran(3, 1)
    assert guesser.chance < high
    for _ in range(8):
        guesser.ran(1, 0)
    low = guesser.chance
    assert low < 0.1
    for _ in range(200):
        guesser.ran(0, 0)
    assert abs(guesser.chance - CHANCE) < 0.05, "and forgets it"


def seconds(draft: Wish, script: Script, count: int = 600, sequences: int = 1) -> float:
    """Of answers where a step takes 1 and a row beside it 0.2."""
    now = 0.0

    def ran(rows: int) -> None:
        nonlocal now
        now += 1 + 0.2 * (rows - 1) if rows < 10 else 0.0

    backend = CpuBackend(ScriptedModel(script, ran=ran), sequences, 4096)
    scheduler = Scheduler(backend, Remembering(backend, None), None, lambda: now, draft)
    for number in range(sequences):
        ids = [number, *[1, 2, 3, 4, 5] * 4]
        scheduler.submit(Run(Job(ids, Sampler(), count), lambda e: None, 4096, lambda: None))
    while scheduler.turn():
        pass
    return now


@pytest.mark.parametrize("sequences", [1, 3, 6])
def test_drafts_that_are_wrong_cost_little(sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_drafts, "PromptLookup", lambda: Fixed([63] * 7, None))
    plain, always, auto = (
        seconds(draft, repeating(5), sequences=sequences) for draft in ("off", 7, "auto")
    )
    assert plain < always and plain < auto <= 1.05 * plain


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_drafts_that_are_right_pay(sequences: int) -> None:
    """Also where each sequence has but one row more."""
    plain = seconds("off", repeating(5), sequences=sequences)
    best = {1: 0.35, 2: 0.45, 4: 0.8}[sequences]
    assert seconds("auto", repeating(5), sequences=sequences) < best * plain


@pytest.mark.parametrize("more", [{"logprobs": 0}, {"constraint": Alternating()}])
def test_what_a_seed_alone_does_not_draw_is_not_drafted(more: dict[str, Any]) -> None:
    engine = ServeEngine(small.backend(1), Options(draft=4))
    ask(engine, job(IDS[:40] * 2, 12, **more)).wait()
    ask(engine, job(IDS[:40] * 2, 12, Sampler(repetition_penalty=1.1))).wait()
    engine.close(finish=True)
    assert engine.stats().drafted == 0


def test_experts_behind_a_bus_are_not_drafted_for_unasked() -> None:
    backend: Any = CpuBackend(ScriptedModel(sums(64)), 1, 100)
    backend.experts_on_host = True
    assert Drafting(backend, "auto").room(1) == 0
    assert Drafting(backend, 3).room(1) == 7
    with pytest.raises(RuntimeRefusal, match="draft is 8, expected auto, off, or 0 to 7"):
        Drafting(backend, 8)


@pytest.mark.parametrize("kind", [DraftKind.DSPARK, DraftKind.MTP])
def test_draft_layers(kind: DraftKind) -> None:
    """Propose for each sequence, also behind a beginning that was remembered."""
    model: Model = test_draft.model(kind)

    def plain(prompt: list[int], count: int) -> list[int]:
        session = test_draft.model(DraftKind.NONE).session(320)
        return list(generate(session, prompt, count, Sampler(1.0, seed=5)))

    vocab = model.config.vocab_size
    ids = [one % vocab for one in IDS[:290]]
    engine = ServeEngine(CpuBackend(model, 2, 320), Options(draft=3))
    heard = [ask(engine, job(ids[:n], 10, Sampler(1.0, seed=5))) for n in (260, 70, 9)]
    again = ask(engine, job([*ids[:258], 5], 10, Sampler(1.0, seed=5))).wait()
    engine.close(finish=True)
    wanted = [plain(ids[:n], 10) for n in (260, 70, 9)]
    assert [one.tokens for one in heard] == wanted
    assert again.tokens == plain([*ids[:258], 5], 10) and again.cached == 256
    found = engine.stats()
    assert found.drafted > 20 and consistent(engine)
