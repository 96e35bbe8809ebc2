"""Products of few rows with a weight."""
