"""The published `config.json` files as dictionaries, and the published counts that go with them.

Source: the hub's files of the preview (April) and the official releases (0731, 0813).
"""

from __future__ import annotations

import dataclasses
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}

_FLASH_RATIOS = [0, 0] + [4, 128] * 20 + [4]
_PRO_RATIOS = [128, 128] + [4, 128] * 29 + [4]

FLASH: dict[str, Any] = _COMMON | {
    "compress_ratios": [*_FLASH_RATIOS, 0],
    "hidden_size": 4096,
    "index_topk": 512,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "q_lora_rank": 1024,
    "routed_scaling_factor": 1.5,
}

PRO: dict[str, Any] = _COMMON | {
    "compress_ratios": [*_PRO_RATIOS, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}

_DSPARK: dict[str, Any] = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "expert_dtype": "fp4",
}

FLASH_0731: dict[str, Any] = (
    FLASH
    | _DSPARK
    | {
        "compress_ratios": [*_FLASH_RATIOS, 0, 0, 0],
        "dspark_markov_rank": 256,
        "dspark_target_layer_ids": [40, 41, 42],
    }
)

PRO_0813: dict[str, Any] = (
    PRO
    | _DSPARK
    | {
        "compress_ratios": [*_PRO_RATIOS, 0, 0, 0],
        "dspark_markov_rank": 512,
        "dspark_target_layer_ids": [58, 59, 60],
    }
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A release's config.json, its draft flavour, and what its files hold.

    by_dtype: safetensors dtype -> (tensors or None where no figure is published, bytes).
    """

    config: dict[str, Any]
    draft: str
    tensors: int
    payload_bytes: int
    by_dtype: dict[str, tuple[int, int | None]] | None


PUBLISHED: dict[str, Published] = {
    "Flash": Published(
        FLASH,
        "mtp",
        69_187,
        159_609_485_896,
        {
            "BF16": (433, 2_830_518_528),
            "F32": (417, 144_672_072),
            "F8_E4M3": (375, 6_023_020_544),
            "F8_E8M0": (34_167, 8_858_737_664),
            "I64": (3, 18_616_320),
            "I8": (33_792, 141_733_920_768),
        },
    ),
    "Flash-0731": Published(
        FLASH_0731,
        "dspark",
        72_317,
        166_878_536_440,
        {
            "BF16": (445, 2_967_134_976),
            "F32": (433, 150_966_520),
            "F8_E4M3": (390, 6_304_038_912),
            "F8_E8M0": (35_718, 9_261_408_000),
            "I64": (3, None),
            "I8": (35_328, 148_176_371_712),
        },
    ),
    "Pro": Published(PRO, "mtp", 145_116, 864_704_792_696, None),
    "Pro-0813": Published(
        PRO_0813,
        "dspark",
        149_782,
        892_727_580_904,
        {
            "BF16": (631, 5_909_640_704),
            "F32": (606, 362_120_232),
            "F8_E4M3": (543, 23_952_621_568),
            "F8_E8M0": (74_271, 50_735_763_136),
            "I64": (3, None),
            "I8": (73_728, 811_748_818_944),
        },
    ),
}
