"""One sequence: its caches, its position, and the checks before anything is changed.

`SequenceBase` is the same on every processor; `Session` runs a `Model`, `gpu.session.GpuSession` a
`GpuModel`.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.runtime.cache import SLACK, LayerCache, WindowCache, allocate
from dsv4.runtime.draft import Draft, Drafter
from dsv4.runtime.positions import RopeTables, Step
from dsv4.runtime.text.drafting import Wish, drafter
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

# Room of a session that names no length. Flash keeps about 7 KB per token in BF16.
DEFAULT_MAX_SEQ_LEN = 32768

# A long input runs in pieces of this many tokens, so that activations stay bounded.
STEP_TOKENS = 512


class SequenceBase(abc.ABC):
    """One sequence, wherever it is computed: position, room, ids, interruption, going back.

    max_seq_len: tokens that it may grow to. slack: how many tokens behind the last one that was
    ever written a sequence may go on, as rings still hold what is seen from there. most_drafts:
    tokens that `propose` proposes at most; 0 where no draft layers are loaded. experts_on_host:
    whether a step brings experts over the bus.
    """

    slack: int
    most_drafts = 0
    experts_on_host = False

    def __init__(self, config: ModelConfig, max_seq_len: int, device: torch.device) -> None:
        self.max_seq_len = max_seq_len
        self._config = config
        self._ids = torch.zeros(max_seq_len, dtype=torch.int32, device=device)
        self._position = 0
        self._written = 0  # positions below it may have been written since the last reset
        self._unknown = 0  # positions below it were filled by somebody else: no ids are known
        self._computed: list[tuple[int, bool]] = []  # (from this position on, whether as a chunk)
        self._interrupted = False

    @property
    def position(self) -> int:
        """Tokens in the sequence so far; the next one gets this position."""
        return self._position

    def reset(self) -> None:
        """Empty the sequence. The memory is kept."""
        self._clear()
        self._forget(0)
        self._position = self._written = self._unknown = 0
        self._interrupted = False

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on: afterwards as if they had never been fed.

        A few tokens cost nothing. Farther back than caches reach, or after an interruption, the
        tokens before `position` are fed again. Raises RuntimeRefusal for a position that the
        sequence has not reached, and where the ids to feed again are not known.
        """
        if not 0 <= position <= self._position:
            raise RuntimeRefusal(
                f"the sequence cannot go back to position {position}: it has {self._position} "
                f"tokens, expected a position from 0 to {self._position}"
            )
        if position == 0:
            return self.reset()
        beyond = self._interrupted or self._written - position > self.slack
        if position < self._unknown or (beyond and self._unknown):
            raise RuntimeRefusal(
                f"the sequence cannot go back to position {position}: the ids of its first "
                f"{self._unknown} tokens are not known; call reset() and feed it again"
            )
        if beyond:
            return self._feed_again(position)
        self._forget(position)
        self._position = position
        return None

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        """Append `ids` and return the logits that follow them.

        ids: int64 `[T]`, at least one, on any device. Returns float32 `[T, vocab]`, or `[1, vocab]`
        of the last token with `logits="last"`, where the model is. Cutting a sequence into any
        chunks gives the same logits.
        Raises RuntimeRefusal, before anything is changed, if an id is not in the vocabulary or
        the sequence would outgrow `max_seq_len`.
        """
        if logits not in ("all", "last"):
            raise RuntimeRefusal(f"logits is {logits!r}, expected 'all' or 'last'")
        self._check(ids)
        ids = ids.to(self._ids.device)
        rows = ids.shape[0] if logits == "all" else 1
        result = torch.empty((rows, self._config.vocab_size), device=ids.device)
        self._feed(ids, result)
        return result

    def propose(self, token: int, count: int) -> Draft:
        """What the draft layers expect after `token`, the next one, which is not fed yet.

        count: proposals, at least 1; fewer are the first rows of more. The sequence is as it was
        afterwards. Raises RuntimeRefusal where the store has no draft layers, for a token that is
        not in the vocabulary, a count that the draft layers do not have, before the first token is
        fed, and where the sequence has no room for `token` and the proposals.
        """
        if not self.most_drafts:
            raise RuntimeRefusal(
                "nothing can be proposed: the model has no draft layers, or was loaded without them"
            )
        for name, value in (("token", token), ("count", count)):
            if type(value) is not int:
                raise RuntimeRefusal(f"{name} is {value!r}, expected a whole number (int)")
        if not 1 <= count <= self.most_drafts:
            raise RuntimeRefusal(
                f"{count} proposals were asked for, expected 1 to {self.most_drafts}, which the "
                "draft layers were made for"
            )
        self._check_whole()
        if not self._position:
            raise RuntimeRefusal(
                "nothing can be proposed before the first token: feed the prompt first"
            )
        check_room(1 + count, self._position, self.max_seq_len)
        check_token(token, self._config.vocab_size)
        with torch.no_grad():
            return self._propose(token, count)

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        draft: Wish = "auto",
    ) -> Generator[int, None, None]:
        """Append `prompt_ids` and yield up to `max_new_tokens` ids, until the model ends its turn.

        temperature 0 is greedy. draft: tokens that are guessed ahead, as it pays ("auto"), "off",
        or always so many, up to 7; the ids are the same. Raises RuntimeRefusal as
        `runtime.text.generate.generate` does.
        """
        return generate(
            self,
            prompt_ids,
            max_new_tokens,
            Sampler(temperature, top_p, seed),
            self._config.eos_token_ids,
            drafter=drafter(self, draft),
        )

    @abc.abstractmethod
    def _clear(self) -> None:
        """Bring the caches to where they were before the first token."""

    @abc.abstractmethod
    def _append(self, ids: Tensor, logits: Tensor, *, chunk: bool) -> None:
        """Run `ids` from the position on. logits: of the last of them, as many as it has rows, go
        there; it may have none. chunk: as `_is_chunk` said.
        """

    @abc.abstractmethod
    def _is_chunk(self, left: int) -> bool:
        """Whether the next of `left` tokens are computed as a chunk, where that differs."""

    @abc.abstractmethod
    def _most_rows(self, chunk: bool) -> int:
        """Tokens that are run at once at most."""

    def _propose(self, token: int, count: int) -> Draft:
        """What `propose` returns, of checked arguments."""
        raise NotImplementedError  # not called where `most_drafts` is 0

    def _forget(self, position: int) -> None:
        """Drop what is known of tokens from `position` on, besides caches."""
        while self._computed and self._computed[-1][0] >= position:
            self._computed.pop()

    def _feed(self, ids: Tensor, result: Tensor) -> None:
        """Append checked ids. result: for the logits of the last of them, as many as its rows."""
        start, silent = 0, len(ids) - len(result)  # no logits are wanted of so many
        with self._changing():
            while start < len(ids):
                chunk = self._is_chunk(len(ids) - start)
                part = ids[start : start + self._most_rows(chunk)]
                end = start + len(part)
                wanted = slice(max(start - silent, 0), max(end - silent, 0))
                self._take(part, result[wanted], chunk=chunk)
                start = end

    def _take(self, part: Tensor, logits: Tensor, *, chunk: bool) -> None:
        """Append what is run at once."""
        end = self._position + len(part)
        self._ids[self._position : end] = part
        self._note(end, chunk)
        self._append(part, logits, chunk=chunk)
        self._position = end

    def _note(self, end: int, chunk: bool) -> None:
        """What lies before `end` is about to be written."""
        self._written = max(self._written, end)
        if not self._computed or self._computed[-1][1] != chunk:
            self._computed.append((self._position, chunk))

    def _feed_again(self, position: int) -> None:
        """From the first token on, in chunks where they were computed so: for the same bytes."""
        ids, parts = self._ids[:position].clone(), list(self._computed)
        nothing = torch.empty((0, self._config.vocab_size), device=ids.device)
        ends = [*(start for start, _ in parts[1:]), position]
        self.reset()
        with self._changing():
            for (_, chunk), end in zip(parts, ends, strict=True):
                while self._position < min(end, position):
                    last = min(end, position, self._position + self._most_rows(chunk))
                    self._take(ids[self._position : last], nothing, chunk=chunk)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Around all that changes caches: what ends early leaves a sequence that says so."""
        self._interrupted = True
        with torch.no_grad():
            yield
        self._interrupted = False

    def _check(self, ids: Tensor) -> None:
        """Refuse here what would fail halfway, when caches are already written."""
        self._check_whole()
        check_ids(ids, self._position, self.max_seq_len, self._config.vocab_size)

    def _check_whole(self) -> None:
        if self._interrupted:
            raise RuntimeRefusal(
                "an earlier forward() of this session was interrupted and left its caches "
                "incomplete; call reset() and feed the sequence again, or rewind()"
            )


class SessionModel(Protocol):
    """What a `Session` needs of its model (see `runtime.model.Model`)."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def head(self) -> Callable[..., Tensor]:
        """`[T, m, D]` -> logits, float32 `[T, vocab]`."""

    @property
    def drafter(self) -> Drafter | None:
        """The draft layers, where they are loaded."""

    def forward(
        self, step: Step, caches: tuple[LayerCache, ...], context: tuple[WindowCache, ...]
    ) -> Tensor:
        """Run one step through all layers -> the last layer's streams `[T, m, D]`."""


class Session(SequenceBase):
    """A sequence that grows by `forward`. Not for concurrent use; a model serves many sessions.

    caches: what it remembers, by layer. context: what draft layers do. step_tokens: most tokens
    that run at once.
    """

    slack = SLACK

    def __init__(self, model: SessionModel, max_seq_len: int | None = None) -> None:
        capacity = capacity_of(model.config, max_seq_len)
        super().__init__(model.config, capacity, model.device)
        self.model = model
        self.step_tokens = STEP_TOKENS
        self.caches = allocate(model.config, capacity, model.dtype, model.device)
        self.context: tuple[WindowCache, ...] = ()
        ahead = 0
        if model.drafter is not None:
            self.context = model.drafter.empty_context()
            self.most_drafts = ahead = model.drafter.most
        self._tables = RopeTables.build(model.config, capacity + ahead, model.device)

    def skip_to(self, position: int) -> None:
        """Go on at `position`: the caller has filled the caches. Raises RuntimeRefusal past their
        capacity.
        """
        if not 0 <= position <= self.max_seq_len:
            raise RuntimeRefusal(f"position {position} is not in a session of {self.max_seq_len}")
        self._position = self._unknown = position
        self._written = max(self._written, position)

    def _clear(self) -> None:
        for cache in self.caches:
            cache.clear()

    def _is_chunk(self, left: int) -> bool:
        return False

    def _most_rows(self, chunk: bool) -> int:
        return self.step_tokens

    def _append(self, ids: Tensor, logits: Tensor, *, chunk: bool) -> None:
        window = self.model.config.sliding_window
        step = Step(ids.to(torch.int64), self._position, window, self._tables)
        streams = self.model.forward(step, self.caches, self.context)
        if len(logits):
            self.model.head(streams[-len(logits) :], out=logits)

    def _propose(self, token: int, count: int) -> Draft:
        assert self.model.drafter is not None  # or `most_drafts` were 0
        return self.model.drafter.propose(
            token, count, self._position, self._tables.sliding, self.context
        )


def capacity_of(config: ModelConfig, max_seq_len: int | None) -> int:
    """Tokens of a session that is asked for `max_seq_len`. Raises RuntimeRefusal for a length that
    the model cannot have.
    """
    limit = config.max_position_embeddings
    capacity = min(DEFAULT_MAX_SEQ_LEN, limit) if max_seq_len is None else max_seq_len
    if not 1 <= capacity <= limit:
        raise RuntimeRefusal(
            f"max_seq_len is {capacity}, expected 1 to {limit} (max_position_embeddings)"
        )
    return capacity


def check_ids(ids: object, position: int, max_seq_len: int, vocab: int) -> None:
    """Raise RuntimeRefusal unless `ids` may follow the `position` tokens that a session has."""
    if not isinstance(ids, Tensor):
        raise RuntimeRefusal(
            f"ids are a {type(ids).__name__}, expected an int64 tensor [T]: torch.tensor(ids)"
        )
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeRefusal(f"ids are {ids.dtype} of shape {tuple(ids.shape)}, expected int64 [T]")
    if ids.shape[0] == 0:
        raise RuntimeRefusal("ids are empty, expected at least one token")
    check_room(ids.shape[0], position, max_seq_len)
    strange = ids[(ids < 0) | (ids >= vocab)]
    if strange.shape[0]:
        check_token(int(strange[0]), vocab)


def check_token(token: int, vocab: int) -> None:
    """Raise RuntimeRefusal unless `token` is in the vocabulary."""
    if not 0 <= token < vocab:
        raise RuntimeRefusal(f"token id {token} is not in the vocabulary of {vocab} ids")


def check_room(count: int, position: int, max_seq_len: int) -> None:
    """Raise RuntimeRefusal unless a session holds `count` tokens more than its `position`."""
    if position + count > max_seq_len:
        raise RuntimeRefusal(
            f"{count} tokens after the {position} already in the session exceed "
            f"its capacity of {max_seq_len}; open it with a larger max_seq_len"
        )
