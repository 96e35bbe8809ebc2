"""An interpreter of PTX: runs kernels where there is no GPU for them.

`launch` runs the compiled host code against a stand-in for the driver and records what it would
launch, tensor maps included; `source` reads the PTX; `warps` runs warps of 32 lanes on it, with
`arithmetic` and `exact` for numbers, `matrices` for small ones in registers, `blackwell` for
barriers, bulk copies, tensor memory and the block-scaled multiplication, and `hopper` for what came
before, as the PTX ISA (9.0) defines them. Asynchronous operations complete late and in random
order, memory begins as NaN, and waiting for ever is an error, so that a missing wait shows.
"""
