"""Source checkpoint -> packed store (offline; no GPU)."""

from dsv4.callable_package import make_callable

make_callable(__name__)
