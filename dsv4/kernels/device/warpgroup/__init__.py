"""The matrix product of four warps: by Hopper's own instruction, or by each warp's on its own."""
