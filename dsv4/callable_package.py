"""Makes a package callable, so that `dsv4.convert(...)` works beside `dsv4.convert.engine`."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def make_callable(package: str) -> None:
    """`package(...)` calls the function of the package's own name in its `engine` module."""

    class CallablePackage(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            engine = importlib.import_module(f"{package}.engine")
            return getattr(engine, package.rpartition(".")[2])(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
