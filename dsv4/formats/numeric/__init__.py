"""Numbers and their encodings: FP4, FP8, block scales, and how matrices lie in memory."""
