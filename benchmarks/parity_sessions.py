"""A session's bytes are its own: alone or among others, launched or as a graph, and every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity_logits import Proof
from dsv4.bench.logits import random_ids
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.prefill_plan import LEAST_ROWS
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

PROMPTS = (5, 41, 130)  # tokens; the last fills the window
SAMPLERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9, "seed": 5},
    {"temperature": 1.0, "seed": 6},
)
CUT = 200  # tokens of the prompt that is cut


Outcome = tuple[list[int], Tensor]
"""Tokens drawn, and the logits of a few more that are fed afterwards."""


def sessions(gpu: GpuModel, tokens: int) -> Iterator[Proof]:
    """Each prompt continued by `tokens` tokens, in several ways; all have to be equal."""
    alone = [_outcome(gpu.session(_room(tokens)), n, tokens) for n in range(len(PROMPTS))]
    ways: dict[str, Callable[[], Sequence[Outcome]]] = {
        "among two others, in turns": lambda: _interleaved(gpu, tokens),
        "launched one by one": lambda: [
            _outcome(gpu.session(_room(tokens), graphs=False), n, tokens)
            for n in range(len(PROMPTS))
        ],
        "one after another in one session": lambda: _reused(gpu, tokens),
        "in a session of another capacity": lambda: [
            _outcome(gpu.session(2 * _room(tokens)), n, tokens) for n in range(len(PROMPTS))
        ],
    }
    for what, run in ways.items():
        same = [_equal(*pair) for pair in zip(alone, run(), strict=True)]
        compared = sum(len(drawn) for drawn, _ in alone)
        nbytes = sum(int(logits.nbytes) for _, logits in alone)
        yield Proof(
            f"a session {what}",
            f"{compared} tokens and {nbytes / 1e6:.1f} MB of logits "
            f"{'equal' if all(same) else 'DIFFER'}",
            "equal",
            all(same),
        )
    yield _cuts(gpu, 0, (1, 13))
    yield _cuts(gpu, CUT, (LEAST_ROWS, 3 * LEAST_ROWS))


def _room(tokens: int) -> int:
    return max(PROMPTS) + tokens + 16


def _outcome(session: GpuSession, number: int, tokens: int) -> Outcome:
    drawn = list(_generation(session, number, tokens))
    return drawn, _more(session, number)


def _generation(session: GpuSession, number: int, tokens: int) -> Iterator[int]:
    ids = random_ids(session.model.config.vocab_size, PROMPTS[number], 10 + number)
    return generate(session, ids, tokens, Sampler(**SAMPLERS[number]))


def _more(session: GpuSession, number: int) -> Tensor:
    """Logits of five more tokens."""
    return session.forward(random_ids(session.model.config.vocab_size, 5, 20 + number)).cpu()


def _interleaved(gpu: GpuModel, tokens: int) -> list[Outcome]:
    rng = random.Random(7)
    open_ = [gpu.session(_room(tokens)) for _ in PROMPTS]
    running = {n: _generation(session, n, tokens) for n, session in enumerate(open_)}
    drawn: list[list[int]] = [[] for _ in PROMPTS]
    while running:
        number = rng.choice(sorted(running))
        token = next(running[number], None)
        if token is None:
            del running[number]
        else:
            drawn[number].append(token)
    logits: dict[int, Tensor] = {}
    for number in rng.sample(range(len(PROMPTS)), len(PROMPTS)):
        logits[number] = _more(open_[number], number)
    return [(drawn[n], logits[n]) for n in range(len(PROMPTS))]


def _reused(gpu: GpuModel, tokens: int) -> list[Outcome]:
    session = gpu.session(_room(tokens))
    found: dict[int, Outcome] = {}
    for number in (len(PROMPTS) - 1, *range(len(PROMPTS) - 1)):
        session.reset()
        found[number] = _outcome(session, number, tokens)
    return [found[n] for n in range(len(PROMPTS))]


def _equal(one: Outcome, other: Outcome) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


def _cuts(gpu: GpuModel, chunk: int, sizes: tuple[int, int]) -> Proof:
    """A prompt in pieces of every size gives the bytes that it gives in one: by steps, which any
    piece is cut into, and by chunks, in pieces that are chunks.
    """
    count, rng = CUT, random.Random(8)
    ids, session = random_ids(gpu.config.vocab_size, count, 30), gpu.session(count, chunk=chunk)
    whole = session.forward(ids)
    different = 0
    for _ in range(3):
        session.reset()
        parts, first = [], 0
        while first < count:
            size = rng.randint(*sizes)
            size = count - first if count - first - size < sizes[0] else size
            parts.append(session.forward(ids[first : first + size]))
            first += size
        different += not torch.equal(torch.cat(parts), whole)
    how = "chunks" if chunk else "steps"
    return Proof(
        f"a prompt of {count} tokens read by {how} and cut at random, three times",
        f"{count * 3} rows of logits {'equal' if not different else 'DIFFER'}",
        "equal",
        not different,
    )
