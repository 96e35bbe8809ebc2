"""A layer's caches in a step: their rows, the compressors' state, and query heads."""
