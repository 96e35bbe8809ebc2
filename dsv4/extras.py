"""Which extra brings a package that is not installed: the halves are installed apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dsv4.formats.errors import MissingExtraError

BRINGS = {
    "convert": ("blake3", "httpx2", "huggingface_hub", "jinja2", "safetensors", "zarr"),
    "run": ("prompt_toolkit", "tvm_ffi"),
    "serve": ("llguidance", "prometheus_client", "starlette", "uvicorn"),
}
"""Modules by the extra that brings them."""


@contextlib.contextmanager
def missing_ones_named() -> Iterator[None]:
    """A module that is missing, and that an extra brings, raises MissingExtraError instead."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        for extra, modules in BRINGS.items():
            if module in modules:
                raise MissingExtraError(
                    f"this needs dsv4[{extra}], as {module} is not installed: "
                    f"pip install 'dsv4[{extra}]'"
                ) from None
        raise
