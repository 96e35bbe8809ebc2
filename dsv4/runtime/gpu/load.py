"""A packed store to a model on the GPU."""

from __future__ import annotations

import torch

from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.library import Library, architecture, default_location
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.rehearsal import outlined_model, step_kernels
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Part, load_weights
from dsv4.runtime.model import no_gpu
from dsv4.runtime.startup_clock import Mark


def load(store: PackedStore, device: torch.device, mark: Mark) -> GpuModel:
    """Find the kernels first, then bring the weights; draft layers stay where they are.

    Raises RuntimeRefusal without a GPU or for a format that no kernel reads, KernelError for
    kernels that are missing or stale, StoreError for a damaged store.
    """
    if not torch.cuda.is_available():
        raise no_gpu()
    library = Library(default_location(), architecture(device), store.root)
    torch.empty(1, device=device)
    mark("context")
    require_kernels(store, library)
    mark("kernels found")
    weights = load_weights(store, device, parts={Part.CORE, Part.EXPERTS})
    mark("weights")
    model = GpuModel(Loaded(weights), library, device)
    model.load_report = weights.reports[0]
    return model


def require_kernels(store: Nodes, library: Library) -> None:
    """Find what a step of a store needs. Raises KernelError for one that is missing or stale, and
    as `outlined_model`.
    """
    for kernel in step_kernels(outlined_model(store), rows=1, capacity=1):
        library.function(kernel)
