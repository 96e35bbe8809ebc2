"""What runs where: what a store takes of a GPU, what stays there, and about how fast it is.

Sizes and places come from what the loader and the engine ask for themselves (`beside_experts`,
`place_as_asked`, `session_sizes`); so a store fits here exactly where its load and its session are
not refused, and as many experts stay on the GPU.

Time of a token, one row, no draft:

    bytes that a step reads / bandwidth + layers x what a layer takes besides
    + misses x bytes of an expert / bus
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsv4.formats.errors import OutOfSpaceError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.plain_text import counted, size
from dsv4.formats.store.matrix_views import Nodes
from dsv4.runtime.gpu.caches import read_nbytes
from dsv4.runtime.gpu.engine import SessionSizes, session_sizes
from dsv4.runtime.gpu.load import (
    beside_experts,
    drafts_nbytes,
    drafts_refusal,
    no_room_for_drafts,
)
from dsv4.runtime.gpu.rehearsal import refuse_sizes
from dsv4.runtime.load.arena import HEADROOM
from dsv4.runtime.load.expert_sizes import ExpertSizes, expert_sizes
from dsv4.runtime.load.placement import Counts, Experts, Placement, place, place_as_asked
from dsv4.runtime.load.plan import ALONE, MODEL, Part, Share, plan_load
from dsv4.runtime.load.records import record_of
from dsv4.runtime.machines import KNOWN, Gpu
from dsv4.runtime.session import capacity_of
from dsv4.runtime.text.request import RUN_MAX_SEQ_LEN

MOST_GPUS = 1
"""That `dsv4 run` shares a model out to."""

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
    """Of one GPU, in bytes. core: weights by what they are; arena: what the loader asks for besides
    records of experts; draft: of the draft layers, with what a session takes more for them;
    draft_refusal: why no GPU runs them; session: see `SessionSizes`, without them; beside: all that
    experts do not get; core_read, cache_read: of the core and the caches, by one step at the full
    context.
    """

    core: Mapping[str, int]
    experts: ExpertSizes
    arena: int
    draft: int
    draft_refusal: str | None
    session: SessionSizes
    beside: int
    context: int
    core_read: int
    cache_read: int
    top_k: int

    @property
    def whole(self) -> int:
        """What has to be free for a load and a session with every expert resident."""
        return self.beside + self.experts.nbytes


def needs_of(store: Nodes, context: int | None = None, share: Share = ALONE) -> Needs:
    """What a store takes of a GPU, for a sequence of `context` tokens or as many as `run` takes.

    Raises RuntimeRefusal for sizes and experts that no kernel takes and for a length that the model
    cannot have, FormatError for a share that its arrays cannot be cut into.
    """
    config = store.config
    refuse_sizes(store)
    record_of(store)
    wanted = min(RUN_MAX_SEQ_LEN, config.max_position_embeddings)
    capacity = capacity_of(config, context or wanted)
    core = dict.fromkeys((*_KINDS, OTHERS), 0)
    tables = 0
    for path, placed in plan_load(store, {Part.CORE}, share).arrays.items():
        core[_kind(path)] += placed.nbytes
        tables += placed.nbytes if path.endswith("tid2eid") else 0
    refusal = drafts_refusal(store) if store.contents.draft is not DraftKind.NONE else None
    return Needs(
        core=core,
        experts=expert_sizes(store, share),
        arena=plan_load(store, MODEL, share, records=True).nbytes,
        draft=_draft_nbytes(store, capacity, share, refusal),
        draft_refusal=refusal,
        session=session_sizes(config, 1, capacity),
        beside=beside_experts(store, 1, capacity, share),
        context=capacity,
        core_read=sum(core.values()) - core["embedding"] - tables,
        cache_read=read_nbytes(config, capacity, 1),
        top_k=config.num_experts_per_tok,
    )


def _draft_nbytes(store: Nodes, capacity: int, share: Share, refusal: str | None) -> int:
    if store.contents.draft is DraftKind.NONE:
        return 0
    if refusal is not None:
        return plan_load(store, {Part.DRAFT}, share).nbytes
    return drafts_nbytes(store, 1, capacity, share)


def _kind(path: str) -> str:
    return next((kind for kind, shape in _KINDS.items() if re.search(shape, path)), OTHERS)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A store on `gpus` of a GPU. free: bytes of each; host: bytes of host memory, None if unknown.

    refusal: why experts cannot be placed as they were asked for; what follows is then how they
    would be. resident: experts that a GPU keeps; spare: records for those that are fetched; misses:
    choices of a token that meet another one, by counts or as if all were chosen alike (`counted`).
    """

    needs: Needs
    gpu: Gpu
    gpus: int
    free: int
    host: int | None
    refusal: str | None
    resident: int
    spare: int
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
        return self.elsewhere * self.needs.experts.record_nbytes

    @property
    def without_drafts(self) -> str | None:
        """Why draft layers, which the store has, are not loaded; None where they are."""
        own = self.needs
        if own.draft_refusal is not None:
            return own.draft_refusal
        records = self.resident + self.spare
        left = self.free - own.beside - records * own.experts.record_nbytes
        return no_room_for_drafts(self.elsewhere, own.draft, left)

    @property
    def reasons(self) -> list[str]:
        """Why it does not fit: sentences, none where it does."""
        found = []
        if self.gpus > MOST_GPUS:
            found.append(f"runs on {self.gpus} GPUs are not built yet")
        if self.refusal is not None:
            found.append(self.refusal)
        elif self.elsewhere and self.host is not None and self.pinned + HEADROOM > self.host:
            found.append(
                f"experts in host memory need {size(self.pinned)} of it and {size(HEADROOM)} that "
                f"stay free, there are {size(self.host)}"
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
        return self.misses * self.needs.experts.record_nbytes / self.gpu.bus

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
                f"misses {self.misses:.1f} of {choices} choices with none cached, {how}, x "
                f"{size(own.experts.record_nbytes)} at {gpu.bus / 1e9:.0f} GB/s = "
                f"{_ms(self.miss_seconds)}"
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
            "drafts_left_out": self.without_drafts if self.needs.draft else None,
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
    it. experts: all resident, as many as fit, or so many bytes. counts: what `run` places by.
    """
    free = gpu.free if free is None else free
    room, sizes = free - needs.beside, needs.experts
    shape = len(sizes.records), sizes.experts
    known = counts if gpus == 1 else None
    refusal = None
    try:
        placed = place_as_asked(experts, known, shape, sizes.record_nbytes, room, gpu.name)
    except OutOfSpaceError as error:
        refusal, placed = str(error), _as_many_as_fit(known, shape, sizes.record_nbytes, room)
    return Fit(
        needs,
        gpu,
        gpus,
        free,
        host,
        refusal,
        resident=int(placed.hot.sum()),
        spare=placed.spare,
        misses=placed.misses(known, needs.top_k),
        counted=known is not None,
        asked=experts,
    )


def _as_many_as_fit(
    counts: Counts | None, shape: tuple[int, int], record: int, room: int
) -> Placement:
    with contextlib.suppress(OutOfSpaceError):
        return place(counts, shape, record, room)
    return Placement(np.zeros(shape, bool), 0)


def remedies(store: Nodes, found: Fit) -> Iterator[str]:
    """What would make it fit: sentences."""
    needs, free = found.needs, found.free
    if (longest := longest_context(store, needs, free)) is not None:
        yield f"--context {longest}: the longest that fits with every expert resident"
    holding = [gpu.name for gpu in KNOWN if gpu.free >= needs.whole]
    if found.gpus == 1 and holding:
        yield f"a GPU that holds all of it: {', '.join(holding)}"
    if found.refusal is not None and found.spare:
        kept = f"{found.resident:,} of {counted(needs.experts.total, 'expert')}"
        yield (
            f"--experts auto: {kept} on the GPU and {size(found.pinned)} of pinned host memory for "
            "the others"
        )
    for gpus in (2, 4, 8):
        if found.gpus == 1 and needs.whole > free:
            shared = needs.arena - needs.core["embedding"] + needs.experts.nbytes
            if needs.whole - shared + shared / gpus <= free:
                note = "" if gpus <= MOST_GPUS else " (not built yet)"
                yield f"{gpus} of this GPU, which share the weights{note}"
                break


def longest_context(store: Nodes, needs: Needs, free: int) -> int | None:
    """The most tokens that fit with every expert resident, if fewer than asked for do."""
    config, others = store.config, needs.whole - needs.session.nbytes

    def fits(context: int) -> bool:
        return others + session_sizes(config, 1, context).nbytes <= free

    if fits(needs.context) or not fits(1):
        return None
    low, high = 1, needs.context  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
