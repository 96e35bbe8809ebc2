"""The model on one GPU: weights in its memory, kernels found, engines to run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.library import Library
from dsv4.runtime.gpu.engine import Engine
from dsv4.runtime.gpu.operands import read_model
from dsv4.runtime.gpu.prefill_plan import SIZES
from dsv4.runtime.gpu.program import Functions
from dsv4.runtime.gpu.rehearsal import chunk_kernels, proposal_kernels, step_kernels
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.gpu.weights import DeviceWeights
from dsv4.runtime.load.report import LoadReport
from dsv4.runtime.load.routes import Routes, default_file
from dsv4.runtime.session import capacity_of


class GpuModel:
    """Operands and kernels. Engines hold what sequences change, but for spare records of experts
    and their counts, which are the model's: of such a model one engine runs at a time.
    """

    def __init__(
        self,
        weights: DeviceWeights,
        library: Library,
        device: torch.device,
        *,
        drafts: bool = False,
    ) -> None:
        """drafts: whether `weights` have DSpark's draft layers, which then run as well.

        Raises RuntimeRefusal for a format that no kernel reads, KernelError for a kernel that is
        missing or stale.
        """
        self.config: ModelConfig = weights.config
        self.device, self.library = device, library
        self.load_reports: tuple[LoadReport, ...] = ()
        self.pinning = 0.0
        self.notices: tuple[str, ...] = ()  # what was left out, for people
        self.routes: Routes | None = None
        self.operands = read_model(weights, drafts=drafts)
        self.functions = Functions(library)
        some = self.operands.different_layers()
        for rows in SIZES:
            for kernel in chunk_kernels(some, rows, 1):
                self.functions.of(kernel)
        for kernel in (*step_kernels(some, 1, 1), *proposal_kernels(some, 1)):
            self.functions.of(kernel)

    def __repr__(self) -> str:
        c, drafts = self.config, ", draft layers" if self.operands.draft else ""
        return (
            f"<GpuModel of {c.num_hidden_layers} layers{drafts}, {c.n_routed_experts} experts a "
            f"layer, on {self.device}>"
        )

    def load_lines(self) -> Iterator[str]:
        """What loading took, phase by phase, and where experts are, for people."""
        for report in self.load_reports:
            yield from report.lines()
        memory = self.operands.memory
        if memory is not None and memory.placement.cold:
            placed = memory.placement
            expected = placed.misses(
                None if self.routes is None else self.routes.counts, self.config.num_experts_per_tok
            )
            yield (
                f"experts {int(placed.hot.sum())} on the GPU, {placed.cold} in host memory, "
                f"{placed.spare} spare; {expected:.1f} misses a token expected with none cached; "
                f"pinned in {self.pinning:.2f} s"
            )

    def write_routes(self, path: Path | None = None) -> None:
        """Add what tokens chose since to the counts at `path`, by default the user's own.

        Nothing is written where nothing is counted. Raises RuntimeRefusal when it cannot be.
        """
        memory = self.operands.memory
        if self.routes is None or memory is None or not memory.fetches:
            return
        backbone = self.config.num_hidden_layers
        self.routes = self.routes.plus(*(one[:backbone] for one in memory.counted()))
        self.routes.write(path or default_file(self.routes.root))

    def multiprocessors(self) -> int:
        """Of the device."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    def engine(
        self,
        max_seq_len: int | None = None,
        *,
        slots: int = 1,
        chunk: int | None = None,
        graphs: bool = True,
    ) -> Engine:
        """Room for `slots` sequences of up to `max_seq_len` tokens. Arguments, errors: `Engine`;
        raises RuntimeRefusal for a length that the model cannot have.
        """
        capacity = capacity_of(self.config, max_seq_len)
        return Engine(self, capacity, slots=slots, chunk=chunk, graphs=graphs)

    def session(
        self, max_seq_len: int | None = None, *, chunk: int | None = None, graphs: bool = True
    ) -> GpuSession:
        """An empty sequence with an engine of its own. Arguments, errors: `engine`."""
        return self.engine(max_seq_len, chunk=chunk, graphs=graphs).session()
