"""A packed store to a model on the GPU: its experts in one place or in two."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4.formats.errors import Dsv4Error, KernelError, OutOfSpaceError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.plain_text import size
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.library import Library, architecture
from dsv4.runtime.cuda_driver import Driver
from dsv4.runtime.gpu.engine import session_sizes
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.operands import DSpark
from dsv4.runtime.gpu.rehearsal import (
    fetch_kernel,
    outlined_model,
    proposal_kernels,
    step_kernels,
)
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Settings, load_weights, plan_load
from dsv4.runtime.load.arena import HEADROOM, free_memory
from dsv4.runtime.load.placement import Counts, Experts, Placement, place_as_asked
from dsv4.runtime.load.plan import ALONE, EVERYTHING, MODEL, Part, Share
from dsv4.runtime.load.records import load_records, record_of
from dsv4.runtime.load.routes import Routes, default_file, read_routes
from dsv4.runtime.model import no_gpu
from dsv4.runtime.session import capacity_of
from dsv4.runtime.startup_clock import Mark

BESIDE = 768 << 20  # code of kernels, graphs, and what torch keeps


def load(
    store: PackedStore,
    device: torch.device,
    mark: Mark,
    *,
    experts: Experts = "auto",
    routes: Path | None = None,
    max_seq_len: int | None = None,
    slots: int = 1,
    drafts: bool = True,
) -> GpuModel:
    """Find the kernels first, then bring the weights.

    routes: counts of experts to place by; by default the user's own of this store. max_seq_len,
    slots: of the engine that is left room for. drafts: draft layers as well, where `plan_drafts`
    has no reason against it; `notices` of the model say it.

    Raises RuntimeRefusal without a GPU or for a format that no kernel reads, KernelError for
    kernels that are missing or stale, StoreError for a damaged store, OutOfSpaceError where one of
    the memories is too small or cannot be pinned.
    """
    if not torch.cuda.is_available():
        raise no_gpu()
    library = Library(None, architecture(device), store.root)
    torch.empty(1, device=device)
    mark("context")
    require_kernels(store, library)
    mark("kernels found")
    known = known_routes(store, routes)
    placement = plan_experts(store, device, experts, known.counts, slots, max_seq_len)
    stages, reason = 0, None
    if drafts and store.contents.draft is not DraftKind.NONE:
        engine = slots, capacity_of(store.config, max_seq_len)
        stages, reason = plan_drafts(store, placement, free_memory(device)[0], *engine, library)
        placement = placement.with_resident(stages)
    counting = routes is not None or placement.cold > 0
    if counting:
        library.function(fetch_kernel(store.config))
    parts = EVERYTHING if stages else MODEL
    weights = load_weights(store, device, parts=parts, records=True)
    mark("core")
    with torch.cuda.device(device):
        found = load_records(store, placement, device, Settings(), Driver)
    mark("weights")
    memory = ExpertMemory.make(
        placement, found.device, found.host, found.host_address, counting=counting, keep=found
    )
    model = GpuModel(Loaded(weights, memory), library, device, drafts=stages > 0)
    if model.operands.draft is not None and (reason := damage(model.operands.draft)) is not None:
        model = GpuModel(Loaded(weights, memory), library, device)
    model.notices = () if reason is None else (f"draft layers are left out: {reason}",)
    model.load_reports = (*weights.reports, *found.reports)
    model.routes, model.pinning = known, found.pinning
    return model


def known_routes(store: PackedStore, path: Path | None) -> Routes:
    """The counts in the file at `path`, or in the user's own. Raises RuntimeRefusal."""
    root = str(store.manifest["root"])
    shape = store.config.num_hidden_layers, store.config.n_routed_experts
    return read_routes(path or default_file(root), root, shape)


def plan_experts(
    store: PackedStore,
    device: torch.device,
    experts: Experts,
    counts: Counts | None,
    slots: int,
    max_seq_len: int | None,
) -> Placement:
    """Which experts are to be on the device, before anything is loaded. Raises as
    `place_as_asked`.
    """
    config = store.config
    free, name = free_memory(device)
    room = free - beside_experts(store, slots, capacity_of(config, max_seq_len))
    shape = config.num_hidden_layers, config.n_routed_experts
    try:
        return place_as_asked(experts, counts, shape, record_of(store).nbytes, room, name)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(f"{store.root}: {error}") from None


def plan_drafts(
    store: PackedStore,
    placement: Placement,
    free: int,
    slots: int,
    capacity: int,
    library: Library,
) -> tuple[int, str | None]:
    """Whether a GPU of `free` bytes runs the draft layers of a store beside its experts.

    -> how many of them are loaded, all or 0, and why not.
    """
    if (reason := drafts_refusal(store)) is not None:
        return 0, reason
    try:
        for kernel in proposal_kernels(outlined_model(store, drafts=True), capacity=1):
            library.function(kernel)
    except KernelError as error:
        return 0, str(error)
    experts = placement.records * record_of(store).nbytes
    left = free - beside_experts(store, slots, capacity) - experts
    reason = no_room_for_drafts(placement.cold, drafts_nbytes(store, slots, capacity), left)
    return (store.config.num_draft_layers if reason is None else 0), reason


def drafts_refusal(store: Nodes) -> str | None:
    """Why no GPU runs the draft layers of a store, which has some; None where one does."""
    if store.contents.draft is DraftKind.MTP:
        return "MTP is not run by the GPU's kernels yet"
    try:
        outlined_model(store, drafts=True)
        record_of(store, drafts=store.config.num_draft_layers)
    except Dsv4Error as error:
        return str(error)
    return None


def damage(draft: DSpark) -> str | None:
    """Why loaded draft layers cannot draft, as far as that is seen without running them."""
    for name, factor in (("markov_w1", draft.markov_w1), ("markov_w2", draft.markov_w2.codes)):
        if not factor.any():
            return f"{name} holds nothing but zeros, so they are damaged"
    return None


def no_room_for_drafts(cold: int, needed: int, left: int) -> str | None:
    """Why draft layers of `needed` bytes are not loaded where `cold` experts are in host memory and
    `left` bytes are left beside the model; None where they are.
    """
    if cold:
        return "with experts in host memory, every row of a step brings its own over the bus"
    if needed > left:
        return f"they need {size(needed)}, {size(max(left, 0))} are left beside the model"
    return None


def drafts_nbytes(store: Nodes, slots: int, capacity: int, share: Share = ALONE) -> int:
    """Bytes that DSpark's layers take of a device: weights, experts, and what an engine needs.

    Raises RuntimeRefusal for experts that no kernel reads.
    """
    config, stages = store.config, store.config.num_draft_layers
    weights = plan_load(store, {Part.DRAFT}, share, records=True).nbytes
    experts = stages * config.n_routed_experts * record_of(store, drafts=stages).nbytes
    with_them, without = (
        session_sizes(config, slots, capacity, drafts=n).nbytes for n in (stages, 0)
    )
    return weights + experts + with_them - without


def beside_experts(store: Nodes, slots: int, capacity: int, share: Share = ALONE) -> int:
    """Bytes of a device that are not for experts: other weights, an engine, what stays free."""
    core = plan_load(store, MODEL, share, records=True).nbytes
    return core + session_sizes(store.config, slots, capacity).nbytes + HEADROOM + BESIDE


def require_kernels(store: Nodes, library: Library) -> None:
    """Find what a step of a store needs. Raises KernelError for one that is missing or stale, and
    as `outlined_model`.
    """
    for kernel in step_kernels(outlined_model(store), rows=1, capacity=1):
        library.function(kernel)
