"""Kernels that need Blackwell: products of FP4 with FP4 on block-scaled tensor cores (CuTe DSL)."""
