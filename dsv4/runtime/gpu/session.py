"""One sequence on the GPU: caches, one graph for each number of rows, no wait but for the token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import AttentionKind
from dsv4.kernels.core.contract import Buffers, Launch
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.ops.indexer.contract import chosen_of_parts
from dsv4.runtime.gpu.attention_plan import choice_entries
from dsv4.runtime.gpu.buffers import cache_sizes, caches, clear, inputs, tables_nbytes
from dsv4.runtime.gpu.plan import draw, head_launch
from dsv4.runtime.gpu.prefill_plan import LEAST_ROWS, chunk_rows
from dsv4.runtime.gpu.program import Program, allocate
from dsv4.runtime.load.arena import require_memory
from dsv4.runtime.session import DEFAULT_MAX_SEQ_LEN, check_ids, require_tensor
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

if TYPE_CHECKING:
    from dsv4.runtime.gpu.model import GpuModel


DECODE, DRAW = 0, -1  # programs besides those of so many tokens


class GpuSession:
    """A sequence that grows by `forward`. One user at a time.

    A prompt is read in chunks, by matrix products; its last tokens, and what comes after, by steps
    of up to MAX_ROWS, whose results are the same bytes however they are cut.

    caches: what it remembers, by the names of `buffers.caches`. chunk: most tokens of a chunk, by
    default as many as are worth it; 0 for steps alone. graphs: False to launch a step's kernels one
    by one. Raises OutOfSpaceError, before anything is allocated, if the device has not the room.
    """

    def __init__(
        self,
        model: GpuModel,
        max_seq_len: int | None = None,
        *,
        chunk: int | None = None,
        graphs: bool = True,
    ) -> None:
        config, device = model.config, model.device
        limit = config.max_position_embeddings
        capacity = min(DEFAULT_MAX_SEQ_LEN, limit) if max_seq_len is None else max_seq_len
        if not 1 <= capacity <= limit:
            raise RuntimeRefusal(
                f"max_seq_len is {capacity}, expected 1 to {limit} (max_position_embeddings)"
            )
        self.model, self.max_seq_len, self._graphs = model, capacity, graphs
        self.chunk = chunk_rows(capacity) if chunk is None else chunk
        self._position = 0
        self._require_memory()
        rows = max(self.chunk, MAX_ROWS)
        self.caches = caches(config, capacity, rows, device)
        self._inputs = inputs(config, rows, device)
        self._drawn: Tensor = self._inputs["ids"][:1]
        self._sampler: Sampler | None = None
        known = model.buffers(capacity) | self.caches | self._inputs
        self._buffers = known | self._scratch(known, device)
        self._programs: dict[int, Program] = {}

    @property
    def position(self) -> int:
        """Tokens in the sequence so far; the next one gets this position."""
        return self._position

    def reset(self) -> None:
        """Empty the sequence. The memory is kept."""
        clear(self.caches)
        self._position, self._sampler = 0, None

    def _require_memory(self) -> None:
        config, capacity, nowhere = self.model.config, self.max_seq_len, torch.device("meta")
        rows = max(self.chunk, MAX_ROWS)
        own = caches(config, capacity, rows, nowhere) | inputs(config, rows, nowhere)
        scratch = self._scratch(self.model.operands.buffers | own, nowhere)
        needed = sum(int(one.nbytes) for one in (own | scratch).values())
        require_memory(
            needed + tables_nbytes(config, capacity + MAX_ROWS),
            self.model.device,
            f"a session of {capacity} tokens needs",
            "open it with a smaller max_seq_len",
        )

    def _scratch(self, known: Buffers, device: torch.device) -> Buffers:
        """What chunks write, and what only steps write, which have fewer rows."""
        model, capacity, found = self.model, self.max_seq_len, Buffers()
        if self.chunk:
            chunk = model.chunk_launches(self.chunk, capacity)
            found = allocate(chunk, known, self._sizes(self.chunk), device)
        step = model.launches(MAX_ROWS, capacity)
        return found | allocate(step, known | found, self._sizes(MAX_ROWS), device)

    def _program(self, kind: int) -> Program:
        """A step or a chunk of `kind` tokens, or DECODE or DRAW."""
        if kind not in self._programs:
            model, rows = self.model, max(kind, 1)
            launches: list[Launch] = []
            if kind > MAX_ROWS:
                launches += model.chunk_launches(rows, self.max_seq_len)
            elif kind != DRAW:
                launches += model.launches(rows, self.max_seq_len)
            if kind in (DECODE, DRAW):
                launches.append(draw(model.config))
            buffers = self._buffers
            self._programs[kind] = Program(model.library, launches, buffers, rows, self._graphs)
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
        count, start = ids.shape[0], 0
        result = torch.empty(
            (count if logits == "all" else 1, self.model.config.vocab_size), device=ids.device
        )
        while start < count:
            part = ids[start : start + self._next_rows(count - start)]
            wanted = len(part) if logits == "all" else int(start + len(part) == count)
            at = start if logits == "all" else 0
            if len(part) > MAX_ROWS:
                self._read_chunk(part, result[at : at + wanted])
            else:
                found = self._step(part)
                result[at : at + wanted] = found[len(part) - wanted :]
            start += len(part)
        return result

    def append_and_draw(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` and draw the next id: int32 `[1]` on the device, which may be fed as it is.

        Everything that a draw needs lies on the device: a step of one token is a single graph. But
        what the kernel does not know (`Sampler.host_reason`) is drawn on the host: int64 `[1]`.
        """
        if sampler.host_reason() is not None:
            return sampler(self.forward(ids, "last").cpu())
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

    def _next_rows(self, left: int) -> int:
        """Tokens that are run next, of `left`."""
        return min(left, self.chunk if min(left, self.chunk) >= LEAST_ROWS else MAX_ROWS)

    def _step(self, ids: Tensor) -> Tensor:
        """Run up to MAX_ROWS tokens: their logits, overwritten by the next step."""
        rows = self._place(ids)
        self._program(rows).replay()
        self._position += rows
        logits: Tensor = self._buffers["logits"]
        return logits[:rows]

    def _read_chunk(self, ids: Tensor, result: Tensor) -> None:
        """Run many tokens. result: for the logits of the last of them, as many as it has rows."""
        model, rows = self.model, self._place(ids)
        if rows == self.chunk:
            program = self._program(rows)
        else:
            launches = model.chunk_launches(rows, self.max_seq_len)
            program = Program(model.library, launches, self._buffers, rows)
        program.launch()
        self._position += rows
        for first in range(rows - result.shape[0], rows, MAX_ROWS):
            few = min(MAX_ROWS, rows - first)
            x = {"x": self._buffers["x"][first : first + few]}
            head = head_launch(model.operands.head)
            Program(model.library, [head], self._buffers | x, few).launch()
            at = first - rows + result.shape[0]
            result[at : at + few] = self._buffers["logits"][:few]

    def _place(self, ids: Tensor) -> int:
        """Tell the device what comes next; -> how many tokens."""
        rows, first = ids.shape[0], self._position
        self._inputs["ids"][:rows] = ids
        torch.arange(first, first + rows, out=self._inputs["position"][:rows])
        return rows

    def _checked(self, ids: Tensor) -> Tensor:
        """On the device; what the device drew is not looked at: kernels stay in their tables."""
        require_tensor(ids)
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

    def _sizes(self, rows: int) -> dict[str, int]:
        """Of activations and scratch, by the names that kernels give them."""
        config, capacity = self.model.config, self.max_seq_len
        return {
            "rows": rows,
            "capacity": cache_sizes(config, AttentionKind.CSA, capacity, rows)["c_capacity"],
            "chosen": max(chosen_of_parts(config, choice_entries(config, capacity)), 1),
            "activations": rows * (config.num_experts_per_tok + 1),
            "choices": rows * config.num_experts_per_tok,
        }
