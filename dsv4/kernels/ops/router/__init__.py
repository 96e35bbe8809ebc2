"""The router of few rows: gate, scores, choice and weights in one launch."""
