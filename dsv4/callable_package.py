"""Makes a package callable, so that `dsv4.convert(...)` works beside `dsv4.convert.engine`."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any


def make_callable(package: str) -> None:
    """`package(...)` calls the function of the package's own name in its `engine` module.

    Its signature and its documentation are that function's, which `help` and editors show.
    """
    own_doc = sys.modules[package].__doc__ or ""

    def function() -> Any:
        return getattr(importlib.import_module(f"{package}.engine"), package.rpartition(".")[2])

    class CallablePackage(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function()(*args, **kwargs)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(function())

        @property
        def __doc__(self) -> str:  # type: ignore[override]
            name = package.rpartition(".")[2]
            text = inspect.getdoc(function())
            return f"{own_doc}\n\n{name}{inspect.signature(function())}\n\n{text}"

    sys.modules[package].__class__ = CallablePackage
