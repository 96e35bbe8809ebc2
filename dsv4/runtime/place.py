"""Where a store is run: what `--device` means on this machine.

"auto" is the GPU where it can be used. Where it cannot, because its kernels are not built, not
made for it, or take no model of such sizes, the CPU takes over, with a sentence that says how the
GPU would be used; a model that the CPU's memory does not hold is refused with the same sentence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from dsv4.formats.errors import KernelError, OutOfSpaceError, RuntimeRefusal
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.library import Library, architecture
from dsv4.runtime.gpu.load import require_kernels
from dsv4.runtime.gpu.rehearsal import refuse_sizes
from dsv4.runtime.load.arena import free_memory
from dsv4.runtime.load.plan import Part, plan_load
from dsv4.runtime.model import no_gpu

Device = Literal["auto", "cpu", "cuda"]


class Place(NamedTuple):
    """device: for `dsv4.load`. notice: a sentence on why it is not the GPU, if there is one."""

    device: str
    notice: str | None = None


def choose_place(wanted: Device, store: PackedStore) -> Place:
    """What `wanted` comes to for `store`; reads no weight.

    Raises RuntimeRefusal for "cuda" without a GPU, KernelError for "cuda" without its kernels, and
    OutOfSpaceError for "auto" when the GPU cannot be used and the CPU's memory is too small.
    """
    if wanted == "cpu":
        return Place("cpu")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise no_gpu()
        return Place("cpu")
    try:
        arch = architecture(torch.device("cuda"))
        refuse_sizes(store)
        require_kernels(store, Library(None, arch, store.root))
    except (KernelError, RuntimeRefusal) as error:
        if wanted == "cuda":
            raise type(error)(f"{error}; --device cpu needs no kernel") from None
        _require_memory(store, error)
        return Place("cpu", f"the GPU is not used: {error}; running on the CPU, which is slow")
    return Place("cuda")


def _require_memory(store: PackedStore, reason: Exception) -> None:
    needed = plan_load(store, {Part.CORE, Part.EXPERTS}).nbytes
    free, machine = free_memory(torch.device("cpu"))
    if needed > free:
        raise OutOfSpaceError(
            f"the GPU cannot be used: {reason}; on the CPU the model needs {needed / 1e9:.1f} GB, "
            f"{machine} has {free / 1e9:.1f} GB free; --device cpu runs it from the disk, slowly"
        ) from None
