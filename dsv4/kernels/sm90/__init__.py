"""Kernels in CuTe DSL for sm_90a, which sm_100a has too; what differs there is chosen within."""
