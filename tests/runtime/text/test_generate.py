"""The decode loop, over a session whose every next token is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.generate import Timings, generate
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.text.text_fixtures import FakeSession

VOCAB = 32
GREEDY = Sampler(0.0)


def table_model(ids: Sequence[int]) -> int:
    """A fixed permutation walk: the next token depends on the last one only."""
    return (5 * ids[-1] + 3) % VOCAB


def chain(first: int, count: int) -> list[int]:
    ids = [first]
    for _ in range(count):
        ids.append(table_model(ids))
    return ids[1:]


def test_tokens_are_the_models_and_each_is_fed_once() -> None:
    session = FakeSession(table_model, vocab=VOCAB)
    assert list(generate(session, [4, 9], 6, GREEDY)) == chain(9, 6)
    # The prompt at once, then one by one; the last token is wanted by nobody.
    assert session.calls == [[4, 9]] + [[token] for token in chain(9, 6)[:-1]]


def test_tokens_come_as_they_are_drawn() -> None:
    session = FakeSession(table_model, vocab=VOCAB)
    tokens = generate(session, [4, 9], 6, GREEDY)
    assert session.calls == [], "nothing is fed before the first token is asked for"
    for i, token in enumerate(chain(9, 6)):
        assert next(tokens) == token
        assert len(session.calls) == i + 1


def test_a_stop_id_ends_it_unyielded_and_unfed() -> None:
    session = FakeSession(table_model, vocab=VOCAB)
    expected = chain(9, 6)
    assert list(generate(session, [4, 9], 6, GREEDY, {expected[3]})) == expected[:3]
    assert session.consumed == [4, 9, *expected[:3]]
    at_once = FakeSession(table_model, vocab=VOCAB)
    assert list(generate(at_once, [9], 6, GREEDY, [expected[0], 99])) == []
    assert at_once.consumed == [9]


@pytest.mark.parametrize("taken", range(5))
def test_position_tells_what_was_consumed_however_it_ends(taken: int) -> None:
    session = FakeSession(table_model, vocab=VOCAB)
    session.forward(torch.tensor([1, 2, 3]))
    start = session.position
    prompt, drawn = [4, 9], []
    tokens = generate(session, prompt, 5, GREEDY, {chain(9, 4)[-1]})
    for _ in range(taken):
        drawn += [token] if (token := next(tokens, None)) is not None else []
    tokens.close()
    assert session.consumed[start:] == (prompt + drawn)[: session.position - start]


def test_two_turns_appended_equal_one_sequence() -> None:
    split, whole = (FakeSession(table_model, vocab=VOCAB) for _ in range(2))
    first = list(generate(split, [4, 9], 4, GREEDY))
    held = [4, 9, *first][: split.position]
    rest = [4, 9, *first, 7, 8][len(held) :]
    second = list(generate(split, rest, 4, GREEDY))
    assert list(generate(whole, [4, 9, *first, 7, 8], 4, GREEDY)) == second
    assert split.consumed == whole.consumed


def test_the_room_is_checked_before_anything_is_fed() -> None:
    session = FakeSession(table_model, vocab=VOCAB, max_seq_len=10)
    session.forward(torch.tensor([1, 2]))
    with pytest.raises(RuntimeRefusal, match=r"3 prompt tokens and 6 new ones exceed the 8 .* 10"):
        generate(session, [1, 2, 3], 6, GREEDY)
    assert session.position == 2
    assert len(list(generate(session, [1, 2, 3], 5, GREEDY))) == 5


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [([], 5, "prompt is empty"), ([1], 0, "max_new_tokens is 0"), ([1], -1, "max_new_tokens is")],
)
def test_empty_requests_are_refused_at_the_call(
    prompt: list[int], count: int, message: str
) -> None:
    with pytest.raises(RuntimeRefusal, match=message):
        generate(FakeSession(table_model, vocab=VOCAB), prompt, count, GREEDY)


def test_a_tensor_is_a_prompt_too() -> None:
    session = FakeSession(table_model, vocab=VOCAB)
    assert list(generate(session, torch.tensor([4, 9]), 3, GREEDY)) == chain(9, 3)


class NoisySession(FakeSession):
    """Logits that are random, but the same for the same ids; or broken from a pass on."""

    broken_from = math.inf

    def forward(self, ids: Tensor, logits: object = "all") -> Tensor:
        super().forward(ids)
        seeded = torch.Generator().manual_seed(hash(tuple(self.consumed)))
        row = torch.randn(1, VOCAB, generator=seeded)
        if len(self.calls) > self.broken_from:
            row[0, 5] = math.nan
        return row


def test_sampling_is_repeatable_by_seed() -> None:
    def run(seed: int) -> list[int]:
        session = NoisySession(table_model, vocab=VOCAB)
        return list(generate(session, [1, 2], 40, Sampler(1.0, 0.9, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_broken_logits_are_refused_not_sampled() -> None:
    session = NoisySession(table_model, vocab=VOCAB)
    session.broken_from = 3
    tokens = generate(session, [1, 2], 10, Sampler(1.0, seed=0))
    assert len([next(tokens) for _ in range(3)]) == 3
    with pytest.raises(RuntimeRefusal, match="NaN or infinity"):
        next(tokens)


def test_timings_count_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class SlowSession(FakeSession):
        def forward(self, ids: Tensor, logits: object = "all") -> Tensor:
            now[0] += 0.25 * len(ids)
            return super().forward(ids, "last")

    timings = Timings()
    expected = chain(9, 6)
    for _ in generate(
        SlowSession(table_model, vocab=VOCAB), [1, 2, 4, 9], 9, GREEDY, {expected[4]}, timings
    ):
        now[0] += 100.0  # the consumer's own time
    assert timings == Timings(
        prompt_tokens=4,
        generated_tokens=4,
        prompt_seconds=1.0,
        first_token_seconds=1.0,
        decode_steps=4,
        decode_tokens=4,
        decode_seconds=1.0,
    )
    assert timings.to_dict()["tokens_per_second"] == timings.tokens_per_second == 4.0
    assert timings.prompt_tokens_per_second == 4.0
    assert Timings().tokens_per_second == Timings().prompt_tokens_per_second == 0.0
