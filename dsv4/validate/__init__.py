"""Packed store (and its source) -> verdict (offline; no GPU)."""

from dsv4.callable_package import make_callable

make_callable(__name__)
