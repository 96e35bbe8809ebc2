"""The kernels: what each computes (`reference`, `ops`), how it is built and checked (`core`)."""
