"""What kernels share on the device: instructions, copies, barriers, matrix products (CuTe DSL)."""
