"""Checkpoints with meaningless numbers."""
