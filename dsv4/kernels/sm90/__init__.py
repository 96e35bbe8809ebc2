"""Kernels in CuTe DSL for sm_90a; those without Hopper's own instructions serve sm_100a too."""
