"""What runs where: what a store takes of a GPU, what stays there, and how fast that is at most.

Sizes come from what the loader and the engine ask for themselves (`plan_load`, `session_sizes`,
`expert_sizes`); so a store fits here exactly where its load and its session are not refused.

Time of a token, one row, no draft:

    bytes that a step reads / bandwidth + layers x what a layer takes besides
    + misses x bytes of an expert / bus
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from dsv4.formats.plain_text import counted, size
from dsv4.formats.store.matrix_views import Nodes
from dsv4.runtime.gpu.caches import read_nbytes
from dsv4.runtime.gpu.engine import SessionSizes, session_sizes
from dsv4.runtime.gpu.rehearsal import refuse_sizes
from dsv4.runtime.load.arena import HEADROOM
from dsv4.runtime.load.expert_sizes import (
    Counts,
    ExpertSizes,
    best_residents,
    expert_sizes,
    misses_a_token,
    residents,
    uniform_misses,
)
from dsv4.runtime.load.plan import ALONE, MODEL, Part, Share, part_of, plan_load
from dsv4.runtime.machines import KNOWN, Gpu
from dsv4.runtime.session import capacity_of
from dsv4.runtime.text.request import DEFAULT_MAX_SEQ_LEN

EXPERTS_IN_HOST_MEMORY = False
"""Whether `dsv4 run` keeps experts that do not fit in host memory."""
MOST_GPUS = 1
"""That `dsv4 run` shares a model out to."""

Experts = Literal["auto", "resident"] | int

_KINDS = {  # of core weights: what their paths match
    "embedding": "^embed/",
    "head": "^head/",
    "router gates": "/ffn/gate/",
    "shared experts": "/shared_experts/",
    "attention": "/attn/",
}
OTHERS = "norms and connections"


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of one GPU, in bytes. core: weights by what they are; arena: what the loader asks for when
    every expert is resident; draft: of the draft layers, which are not loaded; read: of the core
    and the caches, by one step at the full context.
    """

    core: Mapping[str, int]
    experts: ExpertSizes
    arena: int
    draft: int
    session: SessionSizes
    context: int
    core_read: int
    cache_read: int
    top_k: int

    @property
    def whole(self) -> int:
        """What has to be free for a load and a session with every expert resident."""
        return self.arena + self.session.nbytes + HEADROOM

    @property
    def least(self) -> int:
        """The same with every expert elsewhere."""
        return self.whole - self.experts.nbytes


def needs_of(store: Nodes, context: int | None = None, share: Share = ALONE) -> Needs:
    """What a store takes of a GPU, for a sequence of `context` tokens or as many as `run` takes.

    Raises RuntimeRefusal for sizes that no kernel takes and for a length that the model cannot
    have, FormatError for a share that its arrays cannot be cut into.
    """
    config = store.config
    refuse_sizes(store)
    wanted = min(DEFAULT_MAX_SEQ_LEN, config.max_position_embeddings)
    capacity = capacity_of(config, context or wanted)
    core = dict.fromkeys((*_KINDS, OTHERS), 0)
    tables = 0
    for path, placed in plan_load(store, {Part.CORE}, share).arrays.items():
        core[_kind(path)] += placed.nbytes
        tables += placed.nbytes if path.endswith("tid2eid") else 0
    has_draft = any(part_of(store, path) is Part.DRAFT for path in store.hierarchy.arrays)
    return Needs(
        core=core,
        experts=expert_sizes(store, share),
        arena=plan_load(store, MODEL, share).nbytes,
        draft=plan_load(store, {Part.DRAFT}, share).nbytes if has_draft else 0,
        session=session_sizes(config, 1, capacity),
        context=capacity,
        core_read=sum(core.values()) - core["embedding"] - tables,
        cache_read=read_nbytes(config, capacity, 1),
        top_k=config.num_experts_per_tok,
    )


def _kind(path: str) -> str:
    return next((kind for kind, shape in _KINDS.items() if re.search(shape, path)), OTHERS)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A store on `gpus` of a GPU. free: bytes of each; host: bytes of host memory, None if unknown.

    resident: experts that a GPU keeps; misses: choices of a token that meet another one, by counts
    or as if all were chosen alike (`counted`).
    """

    needs: Needs
    gpu: Gpu
    gpus: int
    free: int
    host: int | None
    resident: int
    misses: float
    counted: bool
    asked: Experts

    @property
    def elsewhere(self) -> int:
        """Experts in host memory."""
        return self.needs.experts.total - self.resident

    @property
    def pinned(self) -> int:
        """Bytes of host memory that hold them."""
        return self.elsewhere * self.needs.experts.slot

    @property
    def reasons(self) -> list[str]:
        """Why it does not fit: sentences, none where it does."""
        found = []
        if self.gpus > MOST_GPUS:
            found.append(f"runs on {self.gpus} GPUs are not built yet")
        if self.free < self.needs.least:
            found.append(
                f"without any expert it needs {size(self.needs.least)}, {self.gpu.name} has "
                f"{size(self.free)}"
            )
        elif self.elsewhere and self.asked == "resident":
            found.append(
                f"it needs {size(self.needs.whole)}, {self.gpu.name} has {size(self.free)}"
            )
        elif self.elsewhere and not EXPERTS_IN_HOST_MEMORY:
            found.append(
                f"it needs {size(self.needs.whole)}, {self.gpu.name} has {size(self.free)}, and "
                "experts in host memory are not built yet"
            )
        if self.elsewhere and self.host is not None and self.pinned > self.host:
            found.append(
                f"experts in host memory need {size(self.pinned)} of it, there are "
                f"{size(self.host)}"
            )
        return found

    @property
    def fits(self) -> bool:
        """Whether `dsv4 run` would start so."""
        return not self.reasons

    @property
    def step_seconds(self) -> float:
        """Of a token whose experts are all resident."""
        return self.read / self.gpu.bandwidth + self.layers * self.gpu.layer_seconds

    @property
    def miss_seconds(self) -> float:
        """Of a token for experts that are not."""
        return self.misses * self.needs.experts.slot / self.gpu.bus

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence, without drafts."""
        return 1 / (self.step_seconds + self.miss_seconds)

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self.needs.experts.records)

    @property
    def chosen_read(self) -> int:
        """Bytes of the experts of a token."""
        return self.needs.top_k * sum(self.needs.experts.records)

    @property
    def read(self) -> int:
        """Bytes of a step."""
        return self.needs.core_read + self.chosen_read + self.needs.cache_read

    def arithmetic(self) -> Iterator[str]:
        """How tokens_per_second comes about, line by line; of one GPU."""
        if self.gpus > 1:
            yield "not known: what GPUs tell each other takes time, too"
            return
        own, gpu, choices = self.needs, self.gpu, self.needs.top_k * self.layers
        measured = "measured" if gpu.measured else "not measured, by data sheet"
        yield (
            f"a token reads {size(own.core_read)} of core + {choices} experts "
            f"{size(self.chosen_read)} + caches {size(own.cache_read)} = {size(self.read)}"
        )
        yield (
            f"at {gpu.bandwidth / 1e12:.2f} TB/s ({measured}) {_ms(self.read / gpu.bandwidth)}, "
            f"+ {self.layers} layers x {gpu.layer_seconds * 1e6:.0f} us beside the bytes = "
            f"{_ms(self.step_seconds)}"
        )
        if self.elsewhere:
            how = "by the counts of the routes file" if self.counted else "if all are chosen alike"
            yield (
                f"misses {self.misses:.1f} of {choices} choices, {how}, x "
                f"{size(own.experts.slot)} at {gpu.bus / 1e9:.0f} GB/s = {_ms(self.miss_seconds)}"
            )
        total = self.step_seconds + self.miss_seconds
        yield f"together {_ms(total)} a token: {1 / total:.0f} tokens/s"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        own = dataclasses.asdict(self) | {
            "fits": self.fits,
            "reasons": self.reasons,
            "needed_bytes": self.needs.whole,
            "experts_elsewhere": self.elsewhere,
            "pinned_bytes": self.pinned,
            "tokens_per_second": self.tokens_per_second if self.gpus == 1 else None,
            "arithmetic": list(self.arithmetic()),
        }
        own["needs"]["session"] = self.needs.session._asdict()
        return own


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def fit(
    needs: Needs,
    gpu: Gpu,
    *,
    free: int | None = None,
    gpus: int = 1,
    host: int | None = None,
    experts: Experts = "auto",
    counts: Counts | None = None,
) -> Fit:
    """needs: of one of the `gpus`. free: bytes of each, by default of `gpu` with nothing else on
    it. experts: all resident, as many as fit, or at most so many bytes. counts: of decoded tokens.
    """
    free = gpu.free if free is None else free
    budget = free - needs.least
    if isinstance(experts, int):
        budget = min(budget, experts)
    sizes = needs.experts
    kept = sizes.total if budget >= sizes.nbytes else residents(sizes, budget)
    if counts is not None and gpus == 1:
        misses = misses_a_token(counts, best_residents(counts, kept), needs.top_k)
    else:
        misses = uniform_misses(sizes, kept, needs.top_k)
    counted_ = counts is not None and gpus == 1
    return Fit(needs, gpu, gpus, free, host, kept, misses, counted_, experts)


def remedies(store: Nodes, found: Fit) -> Iterator[str]:
    """What would make it fit: sentences."""
    needs, free = found.needs, found.free
    if (longest := longest_context(store, needs, free)) is not None:
        yield f"--context {longest}: the longest that fits with every expert resident"
    holding = [gpu.name for gpu in KNOWN if gpu.free >= needs.whole]
    if found.gpus == 1 and holding:
        yield f"a GPU that holds all of it: {', '.join(holding)}"
    if found.elsewhere and free >= needs.least and found.asked != "resident":
        kept = f"{found.resident:,} of {counted(needs.experts.total, 'expert')}"
        note = "" if EXPERTS_IN_HOST_MEMORY else " (not built yet)"
        yield (
            f"{kept} on the GPU and {size(found.pinned)} of pinned host memory for the others{note}"
        )
    for gpus in (2, 4, 8):
        if found.gpus == 1 and gpus > 1 and needs.whole > free:
            shared = (needs.arena - needs.core["embedding"]) / gpus + needs.core["embedding"]
            if shared + needs.session.nbytes + HEADROOM <= free:
                note = "" if gpus <= MOST_GPUS else " (not built yet)"
                yield f"{gpus} of this GPU, which share the weights{note}"
                break


def longest_context(store: Nodes, needs: Needs, free: int) -> int | None:
    """The most tokens that fit with every expert resident, if fewer than asked for do."""
    config = store.config

    def fits(context: int) -> bool:
        return needs.arena + session_sizes(config, 1, context).nbytes + HEADROOM <= free

    if fits(needs.context) or not fits(1):
        return None
    low, high = 1, needs.context  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
