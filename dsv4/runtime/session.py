"""One sequence: its caches, its position, and the checks before anything is changed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.cache import allocate
from dsv4.runtime.positions import RopeTables, Step
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

if TYPE_CHECKING:
    from dsv4.runtime.model import Model

# Room of a session that names no length. Flash keeps about 7 KB per token in BF16.
DEFAULT_MAX_SEQ_LEN = 32768

# A long input runs in pieces of this many tokens, so that activations stay bounded.
STEP_TOKENS = 512


class Session:
    """A sequence that grows by `forward`. Not for concurrent use; a model serves many sessions.

    caches: what it remembers, by layer. step_tokens: most tokens that run at once.
    """

    def __init__(self, model: Model, max_seq_len: int | None = None) -> None:
        limit = model.config.max_position_embeddings
        capacity = min(DEFAULT_MAX_SEQ_LEN, limit) if max_seq_len is None else max_seq_len
        if not 1 <= capacity <= limit:
            raise RuntimeRefusal(
                f"max_seq_len is {capacity}, expected 1 to {limit} (max_position_embeddings)"
            )
        self.model = model
        self.max_seq_len = capacity
        self.step_tokens = STEP_TOKENS
        self._position = 0
        self._interrupted = False
        self.caches = allocate(model.config, capacity, model.dtype, model.device)
        self._tables = RopeTables.build(model.config, capacity, model.device)

    @property
    def position(self) -> int:
        """Tokens in the sequence so far; the next one gets this position."""
        return self._position

    def reset(self) -> None:
        """Empty the sequence. The memory is kept."""
        for cache in self.caches:
            cache.clear()
        self._position = 0
        self._interrupted = False

    def skip_to(self, position: int) -> None:
        """Go on at `position`: the caller has filled the caches. Raises RuntimeRefusal past their
        capacity.
        """
        if not 0 <= position <= self.max_seq_len:
            raise RuntimeRefusal(f"position {position} is not in a session of {self.max_seq_len}")
        self._position = position

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        """Append `ids` and return the logits that follow them.

        ids: int64 `[T]`, at least one. Returns float32 `[T, vocab]`, or `[1, vocab]` of the last
        token with `logits="last"`. Cutting a sequence into any chunks gives the same logits.
        Raises RuntimeRefusal, before anything is changed, if an id is not in the vocabulary or
        the sequence would outgrow `max_seq_len`.
        """
        if logits not in ("all", "last"):
            raise RuntimeRefusal(f"logits is {logits!r}, expected 'all' or 'last'")
        ids = self._check(ids).to(self.model.device, torch.int64)
        rows = ids.shape[0] if logits == "all" else 1
        vocab = self.model.config.vocab_size
        result = torch.empty((rows, vocab), dtype=torch.float32, device=self.model.device)
        self._interrupted = True
        count = self.step_tokens
        with torch.no_grad():
            for start in range(0, ids.shape[0], count):
                part = ids[start : start + count]
                streams = self._append(part)
                if logits == "all":
                    self.model.head(streams, out=result[start : start + count])
            if logits == "last":
                self.model.head(streams[-1:], out=result)
        self._interrupted = False
        return result

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[int, None, None]:
        """Append `prompt_ids` and yield up to `max_new_tokens` ids, until the model ends its turn.

        temperature 0 is greedy. Raises RuntimeRefusal as `runtime.generate.generate` does.
        """
        sampler = Sampler(temperature, top_p, seed)
        stop_ids = self.model.config.eos_token_ids
        return generate(self, prompt_ids, max_new_tokens, sampler, stop_ids)

    def _append(self, ids: Tensor) -> Tensor:
        """Run at most `step_tokens` tokens through the layers: their streams `[T, m, D]`."""
        step = Step(ids, self._position, self.model.config.sliding_window, self._tables)
        streams = self.model.forward(step, self.caches)
        self._position += step.length
        return streams

    def _check(self, ids: Tensor) -> Tensor:
        """Refuse here what would fail halfway, when caches are already written."""
        if self._interrupted:
            raise RuntimeRefusal(
                "an earlier forward() of this session was interrupted and left its caches "
                "incomplete; call reset() and feed the sequence again"
            )
        return check_ids(ids, self._position, self.max_seq_len, self.model.config.vocab_size)


def require_tensor(ids: object) -> None:
    """Raise RuntimeRefusal for a list or whatever else somebody feeds."""
    if not isinstance(ids, Tensor):
        raise RuntimeRefusal(
            f"ids are a {type(ids).__name__}, expected an int64 tensor [T]: torch.tensor(ids)"
        )


def check_ids(ids: Tensor, position: int, max_seq_len: int, vocab: int) -> Tensor:
    """`ids`, if they may follow the `position` tokens that a session has. Raises RuntimeRefusal."""
    require_tensor(ids)
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise RuntimeRefusal(f"ids are {ids.dtype} of shape {tuple(ids.shape)}, expected int64 [T]")
    if ids.shape[0] == 0:
        raise RuntimeRefusal("ids are empty, expected at least one token")
    if position + ids.shape[0] > max_seq_len:
        raise RuntimeRefusal(
            f"{ids.shape[0]} tokens after the {position} already in the session exceed "
            f"its capacity of {max_seq_len}; open it with a larger max_seq_len"
        )
    strange = ids[(ids < 0) | (ids >= vocab)]
    if strange.shape[0]:
        raise RuntimeRefusal(f"token id {int(strange[0])} is not in the vocabulary of {vocab} ids")
    return ids
