"""What a conversion will take: network, memory, disk, known before anything is read or written."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv4.convert.memory import Budget
from dsv4.convert.pipeline import make_parts
from dsv4.convert.plan import Plan
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.hashing_reader import Schedule

METADATA_BYTES_PER_UNIT = 512  # a line of the journal: result, lineage, extents
DRAFT = "mtp/"  # layers that are packed and proved; a GPU does not run them yet
METADATA_BYTES_PER_FILE = 4096  # a directory, a share of a zarr.json, a line of the manifest


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes. network: every remote file once, and what of it is read again. disk: at its peak.

    run: weights in the memory of the device that runs it: without draft layers and lineage.
    """

    network_bytes: int
    peak_ram_bytes: int
    peak_disk_bytes: int
    workers: int
    run_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return dataclasses.asdict(self)


def budget_for(plan: Plan, source: Source, memory: int, workers: int | None) -> Budget:
    """How the conversion shares out `memory`. Raises OutOfSpaceError when it does not suffice."""
    remote = any(map(source.remote_bytes, source.sizes))
    return Budget.share(memory, workers, plan.outputs, remote=remote)


def forecast(plan: Plan, source: Source, budget: Budget) -> Forecast:
    """What converting `plan` takes, from headers alone."""
    network = sum(map(source.remote_bytes, source.sizes))
    for part in make_parts(plan.units, source.sizes) if network else ():
        if source.remote_bytes(part.file):
            schedule = Schedule(part.file, part.units, part.watched, budget.hold_bytes)
            network += schedule.read_again_bytes()
    disk = plan.output_bytes + metadata_bytes(plan)
    run = sum(
        array.nbytes
        for output in plan.outputs
        if not output.path.startswith(DRAFT)
        for array in output.arrays()
        if not array.path.endswith("/lineage")
    )
    return Forecast(network, budget.peak_bytes, disk, budget.workers, run)


def metadata_bytes(plan: Plan) -> int:
    """Room for journal, metadata and directories beside the files of the plan."""
    files = sum(1 for _ in plan.files())
    return METADATA_BYTES_PER_UNIT * len(plan.units) + METADATA_BYTES_PER_FILE * files
