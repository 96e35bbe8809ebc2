"""Names that the command line offers, light enough to import for `--help`."""

from __future__ import annotations

ARCHITECTURES = ("sm_90a", "sm_100a")
OPERATIONS = (
    "gemv",
    "experts",
    "attention",
    "append",
    "q_rope",
    "indexer",
    "mhc",
    "router",
    "sampling",
    "xxh3",
    "quantize_activations",
    "fp4_gemm",
    "fp4_gemm_grouped",
    "gemm",
    "experts_prefill",
    "swiglu",
)
PREFILL = ("gemm", "experts_prefill", "swiglu")
"""Of those: for chunks of a prompt, of more rows than the others are timed with."""
STEP_ROWS = 8
