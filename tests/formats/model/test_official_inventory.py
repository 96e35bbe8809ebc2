"""The tensor inventory against the published counts and byte totals of four releases."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import pytest

from dsv4.formats.errors import ConfigError, SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, detect_draft
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_inventory import check_inventory, is_vision
from tests.formats.model.headers import Entries, entries_of, stored_by
from tests.support.real_configs import FLASH, FLASH_0731, PRO_0813, PUBLISHED

SMALL = FLASH | {
    "compress_ratios": [0, 0, 4, 128, 0],
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "vocab_size": 1024,
}


@pytest.mark.parametrize("release", PUBLISHED)
def test_counts_and_bytes_are_the_published_ones(release: str) -> None:
    published = PUBLISHED[release]
    config = ModelConfig.from_hf(published.config)
    entries = entries_of(config, DraftKind(published.draft))
    inventory = check_inventory(entries, config)
    assert inventory.draft == published.draft
    assert inventory.draft_stages == config.num_draft_layers
    assert inventory.tensors == len(entries) == published.tensors
    assert inventory.payload_bytes == published.payload_bytes
    assert inventory.vision == ()
    if published.by_dtype is not None:
        assert inventory.by_dtype.keys() == published.by_dtype.keys()
        for dtype, (count, size) in published.by_dtype.items():
            assert inventory.by_dtype[dtype][0] == count, dtype
            assert size is None or inventory.by_dtype[dtype][1] == size, dtype


def test_shapes_are_the_published_ones_of_flash() -> None:
    config = ModelConfig.from_hf(FLASH)
    found = {e.name: ((e.dtype,), e.shape) for e in stored_by(config, DraftKind.MTP)}
    attn, expert = "layers.2.attn", "layers.2.ffn.experts.255"
    assert found[f"{attn}.wq_a.weight"] == (("F8_E4M3",), (1024, 4096))
    assert found[f"{attn}.wq_b.weight"] == (("F8_E4M3",), (32768, 1024))
    assert found[f"{attn}.wkv.weight"] == (("F8_E4M3",), (512, 4096))
    assert found[f"{attn}.wo_a.weight"] == (("F8_E4M3",), (8192, 4096))
    assert found[f"{attn}.wo_a.scale"] == (("F8_E8M0",), (64, 32))
    assert found[f"{attn}.wo_b.weight"] == (("F8_E4M3",), (4096, 8192))
    assert found[f"{attn}.indexer.compressor.ape"] == (("F32",), (4, 256))
    assert found[f"{expert}.w1.weight"] == (("I8",), (2048, 2048))
    assert found[f"{expert}.w1.scale"] == (("F8_E8M0",), (2048, 128))
    assert found[f"{expert}.w2.weight"] == (("I8",), (4096, 1024))
    assert found[f"{expert}.w2.scale"] == (("F8_E8M0",), (4096, 64))
    assert found["layers.2.ffn.gate.tid2eid"] == (("I64",), (129280, 6))
    assert sum(name.startswith("mtp.0.") for name in found) == 1575


def test_real_flash_shards_are_layers() -> None:
    """69,187 = 1,199 direct + 365 block scales + 66,048 expert parts + 1,575 draft tensors."""
    config = ModelConfig.from_hf(FLASH)
    kinds: Counter[str] = Counter()
    for expected in stored_by(config, DraftKind.MTP):
        if expected.name.startswith("mtp."):
            kinds["mtp"] += 1
        elif ".experts." in expected.name:
            kinds["expert"] += 1
        else:
            kinds["scale" if expected.name.endswith(".scale") else "direct"] += 1
    assert kinds == {"direct": 1199, "scale": 365, "expert": 66048, "mtp": 1575}


def _drop(name: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        del entries[name]

    return change


def _add(name: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[name] = TensorEntry(name, "BF16", (1,), 0, 2, "model.safetensors")

    return change


def _alter(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        entries[name] = TensorEntry(name, dtype, shape, 0, 8, "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_drop("layers.1.attn.q_norm.weight"), r"1 missing \(layers\.1\.attn\.q_norm\.weight\)"),
        (_drop("layers.1.attn.wq_a.weight"), r"layers\.1\.attn\.wq_a\.weight .* is missing"),
        (
            _drop("layers.3.ffn.experts.7.w2.scale"),
            r"layers\.3\.ffn\.experts\.7\.w2\.weight is stored as weight I8 .* expected scale",
        ),
        (_drop("mtp.0.hc_head_base"), r"1 missing \(mtp\.0\.hc_head_base\)"),
        (_drop("mtp.0.e_proj.weight"), r"mtp\.0\.e_proj\.weight .* its weight is missing"),
        (_add("layers.4.attn_norm.weight"), r"1 unexplained \(layers\.4\.attn_norm\.weight\)"),
        (_add("layers.3.ffn.experts.8.w1.weight"), "unexplained"),
        (_add("layers.0.attn.indexer.wq_b.weight"), "unexplained"),
        (_add("layers.0.ffn.gate.bias"), r"unexplained \(layers\.0\.ffn\.gate\.bias\)"),
        (_add("mtp.00.norm.weight"), "unexplained"),
        (_add("mtp.2.norm.weight"), r"draft stages are mtp\.\[0, 2\], expected a gapless run"),
        (
            _alter("embed.weight", "F16", (1024, 4096)),
            r"1 malformed .*embed\.weight is stored as weight F16 \[1024, 4096\]; such a weight",
        ),
        (
            _alter("layers.0.attn.wq_a.weight", "F8_E4M3", (1023, 4096)),
            r"is fp8 \[1023, 4096\], expected fp8, nvfp4, BF16 or F32 \[1024, 4096\]",
        ),
        (_alter("layers.0.attn.wq_a.scale", "U8", (8, 32)), "scales cannot be U8"),
        (_alter("layers.0.attn.wq_a.scale", "F32", (8, 31)), r"expected \[8, 32\] for fp8"),
        (_alter("layers.0.ffn.gate.tid2eid", "I32", (1024, 5)), r"is I32 .* \[1024, 6\]"),
        (_alter("layers.0.ffn.gate.tid2eid", "F32", (1024, 6)), "F32 .* expected I64"),
        (_alter("layers.0.attn.q_norm.weight", "I64", (1024,)), "I64 .* such a weight"),
    ],
)
def test_any_difference_is_refused_by_name(
    change: Callable[[Entries], None], sentence: str
) -> None:
    config = ModelConfig.from_hf(SMALL)
    entries = entries_of(config, DraftKind.MTP)
    check_inventory(entries, config)
    change(entries)
    with pytest.raises(SourceError, match=sentence):
        check_inventory(entries, config)


def test_many_differences_are_counted_and_the_first_named() -> None:
    config = ModelConfig.from_hf(SMALL)
    entries = entries_of(config, DraftKind.MTP)
    for name in [name for name in entries if name.startswith("layers.1.")]:
        del entries[name]
    with pytest.raises(
        SourceError, match=r"45 missing \(layers\.1\.attn_norm\.weight; .*; \.\.\.\)"
    ):
        check_inventory(entries, config)


def test_a_checkpoint_without_draft_layers_is_complete() -> None:
    config = ModelConfig.from_hf(SMALL)
    inventory = check_inventory(entries_of(config, DraftKind.NONE), config)
    assert (inventory.draft, inventory.draft_stages) == (DraftKind.NONE, 0)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_dspark_stages_are_counted_from_names(stages: int) -> None:
    config = ModelConfig.from_hf(SMALL | {"dspark_markov_rank": 16})
    entries = entries_of(config, DraftKind.DSPARK, stages)
    assert detect_draft(entries) == (DraftKind.DSPARK, stages)
    assert check_inventory(entries, config).draft_stages == stages
    for name in [name for name in entries if name.startswith(f"mtp.{stages - 1}.")]:
        del entries[name]
    if stages > 1:  # a lost last stage takes the heads behind it along
        with pytest.raises(SourceError, match=rf"missing \(mtp\.{stages - 2}\.hc_head_fn"):
            check_inventory(entries, config)


def test_dspark_needs_its_markov_rank() -> None:
    config = ModelConfig.from_hf(SMALL | {"dspark_markov_rank": 16})
    entries = entries_of(config, DraftKind.DSPARK, 1)
    with pytest.raises(ConfigError, match="dspark_markov_rank is missing"):
        check_inventory(entries, dataclasses.replace(config, dspark_markov_rank=None))


def vision_names(config: ModelConfig) -> list[str]:
    """The tensors Vision-Exp adds to Flash-0731, as its model card and loader list them."""
    names = ["vision.patch_embed.proj.weight", "vision.patch_embed.proj.bias", "vision.norm.weight"]
    for block in range(32):
        at = f"vision.blocks.{block}"
        names += [f"{at}.norm1.weight", f"{at}.norm2.weight"]
        names += [f"{at}.attn.{m}.{p}" for m in ("wqkv", "wo") for p in ("weight", "bias")]
        names += [f"{at}.mlp.w1.weight", f"{at}.mlp.w2.weight"]
    names += [f"aligner.{m}.{p}" for m in ("w1", "w2") for p in ("weight", "bias")]
    names += ["image_start", "image_end", "image_newline", "image_pad"]
    names += [f"layers.{n}.ffn.gate.bias_vl" for n in range(config.num_hidden_layers)]
    names += [f"mtp.{n}.ffn.gate.bias_vl" for n in range(3)]
    return names + [f"layers.{n}.ffn.gate.bias" for n in range(config.num_hash_layers)]


def test_vision_tensors_are_skipped_and_reported() -> None:
    config = ModelConfig.from_hf(FLASH_0731)
    entries = entries_of(config, DraftKind.DSPARK)
    vision = vision_names(config)
    assert len(vision) == 316
    for name in vision:
        _add(name)(entries)
    assert len(entries) == 72_633  # published
    inventory = check_inventory(entries, config)
    assert sorted(inventory.vision) == sorted(vision)
    assert inventory.tensors == 72_317


def test_no_text_tensor_is_taken_for_vision() -> None:
    config = ModelConfig.from_hf(PRO_0813)
    assert not any(is_vision(e.name) for e in stored_by(config, DraftKind.DSPARK))
    assert is_vision("vision.norm.weight")
    assert not is_vision("layers.0.ffn.gate.bias")
    assert not is_vision("visions")


def test_a_config_of_absurd_size_is_refused_before_it_costs_anything() -> None:
    config = dataclasses.replace(ModelConfig.from_hf(SMALL), n_routed_experts=1 << 30)
    with pytest.raises(ConfigError, match="more than 2000000 parameters"):
        check_inventory({}, config)


def test_fp4_columns_must_fill_blocks() -> None:
    config = dataclasses.replace(ModelConfig.from_hf(SMALL), moe_intermediate_size=48)
    with pytest.raises(SourceError, match="48 columns, expected a multiple of 32"):
        check_inventory(entries_of(config, DraftKind.NONE), config)
