"""Packed store (and its source) -> verdict (offline; no GPU)."""
