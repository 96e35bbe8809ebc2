"""One sequence on the GPU: caches, one graph for each number of rows, no wait but for the token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dsv4.formats.config import AttentionKind
from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.operations.gemv import MAX_ROWS
from dsv4.kernels.operations.indexer import chosen_of_parts
from dsv4.runtime.generate import generate
from dsv4.runtime.gpu.attention_plan import choice_entries
from dsv4.runtime.gpu.buffers import cache_sizes, caches, clear, inputs
from dsv4.runtime.gpu.plan import draw
from dsv4.runtime.gpu.program import Program, allocate
from dsv4.runtime.sampling import Sampler
from dsv4.runtime.session import DEFAULT_MAX_SEQ_LEN, check_ids

if TYPE_CHECKING:
    from dsv4.runtime.gpu.model import GpuModel


DECODE, DRAW = 0, -1  # programs besides those of so many tokens


class GpuSession:
    """A sequence that grows by `forward`, MAX_ROWS tokens a step at most. One user at a time."""

    def __init__(self, model: GpuModel, max_seq_len: int | None = None) -> None:
        config, device = model.config, model.device
        limit = config.max_position_embeddings
        capacity = min(DEFAULT_MAX_SEQ_LEN, limit) if max_seq_len is None else max_seq_len
        if not 1 <= capacity <= limit:
            raise RuntimeRefusal(
                f"max_seq_len is {capacity}, expected 1 to {limit} (max_position_embeddings)"
            )
        self.model, self.max_seq_len = model, capacity
        self._position = 0
        self._caches = caches(config, capacity, device)
        self._inputs = inputs(config, device)
        self._drawn: Tensor = self._inputs["ids"][:1]
        self._sampler: Sampler | None = None
        known = model.buffers(capacity) | self._caches | self._inputs
        launches = list(model.launches(MAX_ROWS, capacity))
        self._buffers = known | allocate(launches, known, self._sizes(), device)
        self._programs: dict[int, Program] = {}

    @property
    def position(self) -> int:
        """Tokens in the sequence so far; the next one gets this position."""
        return self._position

    def reset(self) -> None:
        """Empty the sequence. The memory is kept."""
        clear(self._caches)
        self._position, self._sampler = 0, None

    def _program(self, kind: int) -> Program:
        """A step of `kind` tokens, or DECODE or DRAW."""
        if kind not in self._programs:
            model, rows = self.model, max(kind, 1)
            launches = [] if kind == DRAW else list(model.launches(rows, self.max_seq_len))
            if kind in (DECODE, DRAW):
                launches.append(draw(model.config))
            self._programs[kind] = Program(model.library, launches, self._buffers, rows)
        return self._programs[kind]

    def programs_at(self, position: int, rows: int) -> tuple[Program, Program]:
        """For measuring: a step of `rows` tokens from `position` on, and the same of layers alone.

        The first draws as well, but elsewhere than into its own input: repeated, its rows would
        soon be the same token, which reads the same experts, and leave the caches at their end.
        Nothing of the sequence is kept: `reset` afterwards.
        """
        model = self.model
        self._set_sampler(Sampler())
        torch.arange(position, position + rows, out=self._inputs["position"][:rows])
        rng = torch.Generator().manual_seed(rows)
        ids = torch.randint(model.config.vocab_size, (rows,), generator=rng)
        self._inputs["ids"][:rows] = ids
        for name in ("ids", "position"):
            self._buffers[f"spare_{name}"] = self._inputs[name].clone()
        layers = list(model.launches(rows, self.max_seq_len))
        drawn = draw(model.config, "spare_")
        whole = Program(model.library, [*layers, drawn], self._buffers, rows)
        body = Program(model.library, layers[:-2], self._buffers, rows)
        for program in (whole, body):
            program.launch()  # loads the kernels' code
        return whole, body

    def choices(self, rows: int) -> list[Tensor]:
        """For measuring: what the step of `programs_at` chooses, int32 `[T, k]` for each layer."""
        found = []
        for launch in self.model.launches(rows, self.max_seq_len):
            Program(self.model.library, [launch], self._buffers, rows).launch()
            if launch.kernel.operation == "router":
                found.append(self._buffers["topk_idx"][:rows].clone())
        return found

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        """Append `ids` and return the logits that follow them, as `Session.forward` does.

        ids: int64 `[T]`, on any device. Returns float32 `[T, vocab]`, or `[1, vocab]` of the last.
        """
        if logits not in ("all", "last"):
            raise RuntimeRefusal(f"logits is {logits!r}, expected 'all' or 'last'")
        ids, self._sampler = self._checked(ids), None
        count = ids.shape[0]
        result = torch.empty(
            (count if logits == "all" else 1, self.model.config.vocab_size), device=ids.device
        )
        for start in range(0, count, MAX_ROWS):
            found = self._step(ids[start : start + MAX_ROWS])
            if logits == "all":
                result[start : start + MAX_ROWS] = found
            elif start + MAX_ROWS >= count:
                result.copy_(found[-1:])
        return result

    def append_and_draw(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` and draw the next id: int32 `[1]` on the device, which may be fed as it is.

        Everything that a draw needs lies on the device: a step of one token is a single graph.
        """
        if ids is self._drawn and sampler is self._sampler:
            self._check_room(1)
            self._program(DECODE).replay()
            self._position += 1
        else:
            self._buffers["logits"][:1] = self.forward(ids, "last")
            self._set_sampler(sampler)
            self._inputs["position"][0] = self._position - 1
            self._program(DRAW).replay()
        sampler.drawn += 1
        return self._drawn

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[int, None, None]:
        """As `Session.generate`."""
        sampler = Sampler(temperature, top_p, seed)
        return generate(self, prompt_ids, max_new_tokens, sampler, self.model.config.eos_token_ids)

    def _step(self, ids: Tensor) -> Tensor:
        """Run up to MAX_ROWS tokens: their logits, overwritten by the next step."""
        rows, first = ids.shape[0], self._position
        self._inputs["ids"][:rows] = ids
        torch.arange(first, first + rows, out=self._inputs["position"][:rows])
        self._program(rows).replay()
        self._position += rows
        logits: Tensor = self._buffers["logits"]
        return logits[:rows]

    def _checked(self, ids: Tensor) -> Tensor:
        """On the device; what the device drew is not looked at: kernels stay in their tables."""
        self._check_room(ids.shape[0])
        if not ids.is_cuda:
            check_ids(ids, self._position, self.max_seq_len, self.model.config.vocab_size)
        return ids.to(self.model.device, torch.int32)

    def _check_room(self, count: int) -> None:
        if self._position + count > self.max_seq_len:
            raise RuntimeRefusal(
                f"{count} tokens after the {self._position} already in the session exceed its "
                f"capacity of {self.max_seq_len}; open it with a larger max_seq_len"
            )

    def _set_sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler
        parameters = sampler.parameters(1, self.model.device)
        for name, value in parameters._asdict().items():
            self._inputs[name][:1] = value

    def _sizes(self) -> dict[str, int]:
        """Of activations and scratch, by the names that kernels give them."""
        config, capacity = self.model.config, self.max_seq_len
        return {
            "rows": MAX_ROWS,
            "capacity": cache_sizes(config, AttentionKind.CSA, capacity)["c_capacity"],
            "chosen": max(chosen_of_parts(config, choice_entries(config, capacity)), 1),
            "activations": MAX_ROWS * (config.num_experts_per_tok + 1),
        }
