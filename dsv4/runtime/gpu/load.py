"""A packed store to a model on the GPU."""

from __future__ import annotations

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.library import Library, architecture, default_location
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.plan import different_layers, standard_weights, step_launches
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Part, load_weights
from dsv4.runtime.model import no_gpu
from dsv4.runtime.startup_clock import Mark

BY_FORMAT = ("gemv", "router")  # operations whose kernels depend on how weights are stored


def load(store: PackedStore, device: torch.device, mark: Mark) -> GpuModel:
    """Find the kernels first, then bring the weights; draft layers stay where they are.

    Raises RuntimeRefusal without a GPU or for a format that no kernel reads, KernelError for
    kernels that are missing or stale, StoreError for a damaged store.
    """
    if not torch.cuda.is_available():
        raise no_gpu()
    library = Library(default_location(), architecture(device))
    torch.empty(1, device=device)
    mark("context")
    require_kernels(store.config, library)
    mark("kernels found")
    weights = load_weights(store, device, parts={Part.CORE, Part.EXPERTS})
    mark("weights")
    model = GpuModel(Loaded(weights), library, device)
    model.load_report = weights.reports[0]
    return model


def require_kernels(config: ModelConfig, library: Library) -> None:
    """Find what a step needs whatever its weights' formats are. Raises KernelError."""
    layers, head = standard_weights(config)
    layers = different_layers(config, layers)
    for launch in step_launches(config, layers, head, rows=1, capacity=1):
        if launch.kernel.operation not in BY_FORMAT:
            library.function(launch.kernel)
