"""A packed store to a model on the GPU: its experts in one place or in two."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv4.formats.errors import OutOfSpaceError
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.library import Library, architecture
from dsv4.runtime.cuda_driver import Driver
from dsv4.runtime.gpu.engine import session_sizes
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.rehearsal import fetch_kernel, outlined_model, step_kernels
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Settings, load_weights, plan_load
from dsv4.runtime.load.arena import HEADROOM, free_memory
from dsv4.runtime.load.placement import Counts, Experts, Placement, place_as_asked
from dsv4.runtime.load.plan import ALONE, MODEL, Share
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
) -> GpuModel:
    """Find the kernels first, then bring the weights; draft layers stay where they are.

    routes: counts of experts to place by; by default the user's own of this store. max_seq_len,
    slots: of the engine that is left room for.

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
    counting = routes is not None or placement.cold > 0
    if counting:
        library.function(fetch_kernel(store.config))
    weights = load_weights(store, device, parts=MODEL, records=True)
    mark("core")
    with torch.cuda.device(device):
        found = load_records(store, placement, device, Settings(), Driver)
    mark("weights")
    memory = ExpertMemory.make(
        placement, found.device, found.host, found.host_address, counting=counting, keep=found
    )
    model = GpuModel(Loaded(weights, memory), library, device)
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
