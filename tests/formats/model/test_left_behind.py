"""Scales of activations and caches, wherever a tool hangs them; names that nobody knows."""

from __future__ import annotations

import pytest

from dsv4.formats.errors import SourceError
from dsv4.formats.model.closest_name import closest_name
from dsv4.formats.model.inventory import DraftKind, parameters
from dsv4.formats.model.source_inventory import check_inventory
from tests.formats.model.headers import Stored, entries_of, entry, modelopt
from tests.formats.model.test_refusals import CONFIG

WRITTEN = [  # by ModelOpt, llm-compressor, vLLM's own savers
    "model.layers.1.self_attn.k_proj.k_scale",
    "model.layers.1.self_attn.v_proj.v_scale",
    "model.layers.1.self_attn.attn.k_scale",
    "model.layers.1.self_attn.k_scale",
    "layers.1.attn.kv_cache.k_scale",
    "layers.1.attn.q_scale",
    "layers.1.attn.prob_scale",
    "model.layers.1.self_attn.o_a_proj.output_scale",
    "layers.1.attn.wkv.output_scale",
    "layers.1.attn.wq_b.input_scale",
    "model.layers.1.self_attn.compressor.kv_proj.input_scale",
    "mtp.0.attn.mla_attn.kv_cache_scale",
]
NOT_SCALES = [
    ("foo.weight", "BF16", (3,)),
    ("layers.1.attn.foo.weight", "F32", ()),
    ("layers.1.attn.k_proj.k_scale", "F32", (4096,)),  # more numbers than heads
    ("layers.1.attn.k_proj.k_scale", "I64", ()),
    ("layers.1.ffn.k_proj.k_scale", "F32", ()),  # no attention
    ("layers.1.attn.bank_scale", "F32", ()),
]


@pytest.mark.parametrize("shape", [(), (1,), (CONFIG.num_attention_heads,)], ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_scale_of_attention_is_left_behind_and_counted(name: str, shape: tuple[int, ...]) -> None:
    entries = entries_of(CONFIG, DraftKind.MTP, stages=1, dialect=modelopt)
    before = check_inventory(entries, CONFIG)
    entries[name] = entry(Stored(name, "F32", shape))
    after = check_inventory(entries, CONFIG)
    assert after.by_name.keys() == before.by_name.keys()
    assert after.input_scales == before.input_scales + 1
    assert after.tensors == before.tensors + 1
    assert after.payload_bytes == before.payload_bytes + entries[name].nbytes


@pytest.mark.parametrize(("name", "dtype", "shape"), NOT_SCALES)
def test_what_only_looks_like_a_scale_is_not_explained(
    name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    entries = entries_of(CONFIG, DraftKind.MTP, stages=1, dialect=modelopt)
    entries[name] = entry(Stored(name, dtype, shape))
    with pytest.raises(SourceError, match=rf"1 unexplained \({name}\)"):
        check_inventory(entries, CONFIG)


@pytest.mark.parametrize(
    ("renamed", "to", "closest"),
    [
        (
            "layers.2.attn.indexer.weights_proj.weight",
            "model.layers.2.self_attn.compressor.indexer.head.weights_proj.weight",
            r"model\.layers\.2\.self_attn\.compressor\.indexer\.(scorer\.)?weights_proj\.weight",
        ),
        (
            "layers.1.attn.q_norm.weight",
            "layers.1.attn.qnorm.weight",
            r"layers\.1\.attn\.q_norm\.weight",
        ),
        ("embed.weight", "model.embed_token.weight", r"model\.embed_tokens\.weight"),
        (
            "layers.1.ffn.gate.bias",
            "layers.1.mlp.gate.e_score_correct_bias",
            r"layers\.1\.mlp\.gate\.e_score_correction_bias",
        ),
    ],
)
def test_a_name_nobody_knows_is_shown_with_the_closest_known_one(
    renamed: str, to: str, closest: str
) -> None:
    entries = entries_of(CONFIG, DraftKind.NONE, 0)
    old = entries.pop(renamed)
    entries[to] = entry(Stored(to, old.dtype, old.shape))
    with pytest.raises(SourceError, match=rf"; the closest known name is {closest}, for {to}; "):
        check_inventory(entries, CONFIG)


def test_nothing_near_is_no_hint() -> None:
    known = [parameter.name for parameter in parameters(CONFIG)]
    assert closest_name("layers.1.zzzzzzzzzzzzzzzzzzzzzzzz", known) is None
    assert closest_name("layers.77.attn.wq_a.weight", known) is None
    assert closest_name("layers.1.ffn.experts.3.w4.weight", known) in {
        f"layers.1.ffn.experts.{expert}.w{projection}.weight"
        for expert in range(CONFIG.n_routed_experts)
        for projection in (1, 2, 3)
    }
