"""Hyper-connections of few rows, and how CTAs of one launch exchange partial sums."""
