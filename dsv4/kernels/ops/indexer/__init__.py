"""The Lightning indexer of a step: its queries, scores, and the choice of the best."""
