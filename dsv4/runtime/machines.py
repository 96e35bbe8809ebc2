"""GPUs by name, and which of their figures were measured: to plan for a machine elsewhere."""

from __future__ import annotations

import dataclasses

from dsv4.formats.errors import RuntimeRefusal

CONTEXT = 1_200_000_000
"""Bytes of a device that the driver and torch take before anything is loaded (H200: 1.2 GB)."""
LAYER_SECONDS = 49e-6
"""A layer's step beside its bytes: an H200 took 4.58 ms for 43 layers of 128 experts, whose 10.6 GB
are 2.46 ms at the 4.31 TB/s that were measured there."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """memory: bytes that CUDA shows; bandwidth: of it, and bus: of pinned host memory read by
    kernels, both in bytes a second. layer_seconds: see LAYER_SECONDS. measured: whether these are
    figures of this project's runs, not of data sheets.
    """

    name: str
    memory: int
    bandwidth: float
    bus: float
    layer_seconds: float = LAYER_SECONDS
    measured: bool = False

    @property
    def free(self) -> int:
        """Bytes for weights and caches, where nothing else runs."""
        return max(self.memory - CONTEXT, 0)

    def of(self, memory: int) -> Gpu:
        """The same with other memory."""
        return dataclasses.replace(self, memory=memory)


KNOWN = (
    Gpu("h100", 84_000_000_000, 3.0e12, 50e9, 41e-6, measured=True),
    Gpu("h200", 149_250_000_000, 4.31e12, 50e9, measured=True),
    # Data sheets, and nine tenths of their bandwidth, as an H100 and an H200 reach.
    Gpu("h100-nvl", 100_000_000_000, 3.5e12, 50e9),
    Gpu("h20", 102_000_000_000, 3.6e12, 50e9),
    Gpu("b200", 190_000_000_000, 7.2e12, 50e9),
)
NAMES = tuple(gpu.name for gpu in KNOWN)


def find(name: str) -> Gpu:
    """A known GPU, by any spelling such as "H200" or "NVIDIA H200". Raises RuntimeRefusal."""
    words = name.lower().replace("nvidia ", "")
    for gpu in sorted(KNOWN, key=lambda gpu: -len(gpu.name)):
        if words.replace(" ", "-").startswith(gpu.name):
            return gpu
    raise RuntimeRefusal(
        f"{name!r} is not a GPU that is known here, expected one of {', '.join(NAMES)}; "
        "or give --gpu-memory"
    )


def like(name: str, memory: int) -> Gpu:
    """The GPU that calls itself `name`; one that is not known has the rates of an H100."""
    try:
        return find(name).of(memory)
    except RuntimeRefusal:
        return dataclasses.replace(unknown(memory), name=name)


def unknown(memory: int) -> Gpu:
    """A card of which nothing but its memory is known: the rates of an H100."""
    return dataclasses.replace(KNOWN[0], name="GPU", memory=memory, measured=False)
