"""The model on one GPU: weights in its memory, kernels found, sessions to run it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Launch
from dsv4.kernels.core.library import Library
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.runtime.gpu.buffers import tables
from dsv4.runtime.gpu.plan import different_layers, step_launches
from dsv4.runtime.gpu.prefill_plan import SIZES, chunk_launches
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.gpu.weights import DeviceWeights, Operands
from dsv4.runtime.load.report import LoadReport


class GpuModel:
    """Immutable: operands and kernels. A session holds all that a sequence changes."""

    def __init__(self, weights: DeviceWeights, library: Library, device: torch.device) -> None:
        """Raises RuntimeRefusal for a format that no kernel reads, KernelError for a kernel that
        is missing or stale.
        """
        self.config: ModelConfig = weights.config
        self.device, self.library = device, library
        self.load_report: LoadReport | None = None
        self.operands = Operands(weights)
        config, head = self.config, self.operands.head
        layers = different_layers(config, self.operands.layers)
        chunks = (chunk_launches(config, layers, rows, 1) for rows in SIZES)
        for launch in itertools.chain(step_launches(config, layers, head, 1, 1), *chunks):
            library.function(launch.kernel)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<GpuModel of {c.num_hidden_layers} layers, {c.n_routed_experts} experts a layer, on "
            f"{self.device}>"
        )

    def load_lines(self) -> Iterator[str]:
        """What loading took, phase by phase, for people."""
        if self.load_report is not None:
            yield from self.load_report.lines()

    def launches(self, rows: int, capacity: int) -> Iterator[Launch]:
        """A step of `rows` tokens, with caches for `capacity`."""
        own = self.operands
        return step_launches(self.config, own.layers, own.head, rows, capacity)

    def chunk_launches(self, rows: int, capacity: int) -> Iterator[Launch]:
        """A chunk of `rows` tokens, with caches for `capacity`; the head is not part of it."""
        return chunk_launches(self.config, self.operands.layers, rows, capacity)

    def buffers(self, capacity: int) -> Buffers:
        """Weights, and the angles of `capacity` positions."""
        count = torch.cuda.get_device_properties(self.device).multi_processor_count
        angles = tables(self.config, capacity + MAX_ROWS, self.device)
        return self.operands.buffers | angles | {"ctas": int(count)}

    def session(
        self, max_seq_len: int | None = None, *, chunk: int | None = None, graphs: bool = True
    ) -> GpuSession:
        """An empty sequence with room for `max_seq_len` tokens. Arguments, errors: `GpuSession`."""
        return GpuSession(self, max_seq_len, chunk=chunk, graphs=graphs)
