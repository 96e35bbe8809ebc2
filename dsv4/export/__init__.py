"""Packed store -> a checkpoint under the hub's names, with ModelOpt's NVFP4 tensors."""
