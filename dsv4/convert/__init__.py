"""Source checkpoint -> packed store (offline; no GPU)."""
