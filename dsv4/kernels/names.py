"""Names that the command line offers, light enough to import for `--help`."""

from __future__ import annotations

ARCHITECTURES = ("sm_90a", "sm_100a")
CONTRACTS = {
    "gemv": "gemv.contract",
    "experts": "experts.contract",
    "experts_fetch": "experts.fetch_contract",
    "attention": "attention.contract",
    "append": "kv_cache.contract",
    "q_rope": "kv_cache.q_rope_contract",
    "indexer": "indexer.contract",
    "mhc": "hyper_connections.contract",
    "router": "router.contract",
    "sampling": "sampling.contract",
    "xxh3": "xxh3.contract",
    "quantize_activations": "fp4_blackwell.quantize_contract",
    "fp4_gemm": "fp4_blackwell.gemm_contract",
    "fp4_gemm_grouped": "fp4_blackwell.grouped_contract",
    "gemm": "prefill.gemm_contract",
    "experts_prefill": "prefill.experts_contract",
    "swiglu": "prefill.swiglu_contract",
}
"""Operation -> the module below `dsv4.kernels.ops` that says what it has to compute."""
OPERATIONS = tuple(CONTRACTS)
PREFILL = ("gemm", "experts_prefill", "swiglu")
"""Of those: for chunks of a prompt, of more rows than the others are timed with."""
