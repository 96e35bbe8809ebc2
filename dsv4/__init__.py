"""Pack DeepSeek-V4 once, run it in seconds.

    packed = dsv4.open("packed")              # what the bytes are
    model = dsv4.load("packed", device="cpu") # what they do
    dsv4.convert(src, out); dsv4.validate("packed", source=src)
    dsv4.repair("packed", source=src)         # what was damaged since
    dsv4.export("packed", out)                # for servers that read ModelOpt's NVFP4

`import dsv4` is light: torch and all else are imported when they are first needed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv4.formats.errors import Dsv4Error
from dsv4.formats.version import VERSION

if TYPE_CHECKING:
    import torch

    from dsv4.convert.engine import convert
    from dsv4.export.engine import export
    from dsv4.formats.checkpoint import PackedCheckpoint
    from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.model import Model
    from dsv4.runtime.startup_clock import Mark
    from dsv4.validate.engine import validate
    from dsv4.validate.repair import repair

# "convert", "export" and "validate" are packages, and functions that `dsv4.convert(...)` calls.
# Importing a package binds its name here, once: that is done now and undone, so that `__getattr__`
# answers with the function. `from dsv4.convert import engine` goes through sys.modules and does not
# mind; only a dotted path from here (`import dsv4.convert.engine as e`) would meet the function.
for _package in ("convert", "export", "validate"):
    importlib.import_module(f"dsv4.{_package}")
    globals().pop(_package, None)

_WHERE = {
    "convert": "dsv4.convert.engine",
    "export": "dsv4.export.engine",
    "validate": "dsv4.validate.engine",
    "repair": "dsv4.validate.repair",
    "NVFP4Tensor": "dsv4.formats.numeric.nvfp4",
    "dequantize_nvfp4": "dsv4.formats.numeric.nvfp4",
    "quantize_nvfp4": "dsv4.formats.numeric.nvfp4",
}
"""Names that are imported when they are first used, by module."""

__all__ = [
    "Dsv4Error",
    "NVFP4Tensor",
    "__version__",
    "convert",
    "dequantize_nvfp4",
    "export",
    "load",
    "open",
    "quantize_nvfp4",
    "repair",
    "validate",
]

__version__ = VERSION


def open(path: str | Path) -> PackedCheckpoint:
    """Open a packed store: checks its structure, maps nothing yet. Raises StoreError."""
    from dsv4.formats.checkpoint import PackedCheckpoint

    return PackedCheckpoint.open(Path(path))


def load(
    packed: str | Path | PackedCheckpoint,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    numerics: Literal["exact", "caches", "official"] | None = None,
    experts: Literal["auto", "resident"] | int = "auto",
    routes: str | Path | None = None,
    max_seq_len: int | None = None,
    slots: int = 1,
    drafts: bool = True,
    mark: Mark | None = None,
) -> Model | GpuModel:
    """Load the model of a packed store (a path, or what `open` returned).

    On "cpu", and on "cuda" when dtype or numerics is given, this is the reference in torch: weights
    stay packed in the mapped files, every chunk is verified when it is first mapped. dtype:
    torch.float32 (the default) or torch.bfloat16, of activations and caches. numerics "official"
    simulates the FP8 and FP4 activations the weights were trained with, "caches" only what caches
    hold.
    On "cuda" otherwise it is the compiled kernels (`dsv4 kernels build`), which compute what the
    reference does in bfloat16 with numerics "caches".
    experts, there: "auto" keeps as many on the GPU as fit beside `slots` sessions of `max_seq_len`
    tokens and the others in pinned host memory; "resident" all of them; a number: so many bytes.
    routes: file of counts by which they are chosen, by default the user's own of this store.
    drafts: whether the store's draft layers are loaded too, for `session.propose`. On a CPU they
    stay in mapped files like all weights; a session keeps their rings. The compiled kernels run
    DSpark's, where these fit beside the model and all experts are resident; else `notices` of the
    model says why they are left out.
    mark: called with the name of each phase when it ends.
    Raises StoreError, RuntimeRefusal, KernelError or OutOfSpaceError.
    """
    import torch

    from dsv4.formats.model.inventory import DraftKind
    from dsv4.runtime.model import device_named, numerics_named
    from dsv4.runtime.model import load as load_model

    target, chosen = device_named(device), numerics_named(numerics or "exact")
    checkpoint = open(packed) if isinstance(packed, str | Path) else packed
    if target.type == "cuda" and dtype is None and numerics is None:
        from dsv4.runtime.gpu.load import load as load_gpu

        return load_gpu(
            checkpoint.store,
            target,
            mark or (lambda phase: None),
            experts=experts,
            routes=None if routes is None else Path(routes),
            max_seq_len=max_seq_len,
            slots=slots,
            drafts=drafts,
        )
    return load_model(
        checkpoint.store,
        device=target,
        dtype=dtype or torch.float32,
        numerics=chosen,
        draft=checkpoint.store.contents.draft if drafts else DraftKind.NONE,
    )


def __dir__() -> list[str]:
    """The names that are meant to be used."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """The functions and types of `_WHERE`.

    Raises MissingExtraError where the half that has them is not installed, AttributeError for any
    other name.
    """
    if name not in _WHERE:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    from dsv4.extras import missing_ones_named

    with missing_ones_named():
        return getattr(importlib.import_module(_WHERE[name]), name)
