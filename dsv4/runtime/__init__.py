"""Packed store -> tokens (online; opens a store without zarr, safetensors or a hub client)."""
