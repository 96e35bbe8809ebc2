"""Checkpoints and stores with the real architecture and meaningless numbers."""
