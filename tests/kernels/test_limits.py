"""What is refused before a model is packed is what its kernels refuse, and nothing else."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.releases import FLASH, PRO
from dsv4.kernels.limits import LIMITS, refusals
from dsv4.runtime.gpu import rehearsal
from dsv4.runtime.gpu.standard import standard_model

FEW = dataclasses.replace(
    FLASH, num_hidden_layers=4, num_hash_layers=1, compress_ratios=(0, 4, 128, 4)
)
TAKEN: list[dict[str, int]] = [
    {},
    *({"n_routed_experts": count} for count in (8, 96, 160, 216, 512)),
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 16},
    {"n_routed_experts": 8, "num_experts_per_tok": 8},
    *({"hidden_size": size} for size in (1024, 3072, 5120, 7168)),
    *({"moe_intermediate_size": size} for size in (1024, 3072, 8192)),
    {"num_attention_heads": 128},
    *({"q_lora_rank": rank} for rank in (512, 2048)),
    {"o_lora_rank": 128},
    {"o_groups": 2},
    *({"index_topk": count} for count in (256, 1024)),
    *({"vocab_size": size} for size in (4, 1000, 131072)),
]
REFUSED: list[dict[str, int]] = [
    {"n_routed_experts": 513},
    {"num_experts_per_tok": 17},
    {"hidden_size": 1536},
    {"moe_intermediate_size": 1536},
    {"num_attention_heads": 96},
    {"head_dim": 256},
    {"qk_rope_head_dim": 32},
    {"q_lora_rank": 768},
    {"o_lora_rank": 192},
    {"index_n_heads": 32},
    {"index_head_dim": 64},
    {"index_topk": 1280},
    {"hc_mult": 2},
    *({"vocab_size": size} for size in (1002, 131076)),
]
NOT_ASKED = {"hidden_size": 8192, "index_topk": 384, "o_lora_rank": 64}
"""Refused here alone: too much shared memory, rounds that are not whole, rows of two groups."""


def _construct(config: ModelConfig) -> None:
    """Every kernel of a model, as far as one is made without compiling it."""
    for kernel in {one.name: one for one in rehearsal.all_kernels(standard_model(config))}.values():
        module, _, name = kernel.implementation.partition(":")
        made = getattr(importlib.import_module(module), name)
        given = dict(kernel.config)
        if "arch" in inspect.signature(made).parameters:
            given["arch"] = "sm_90a"
        made(**given)


@pytest.fixture(autouse=True)
def _one_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "CAPACITIES", (1 << 15,))


@pytest.mark.parametrize("change", TAKEN, ids=str)
def test_what_is_not_refused_is_constructed(change: dict[str, int]) -> None:
    config = dataclasses.replace(FEW, **change)  # type: ignore[arg-type]
    assert list(refusals(config)) == []
    _construct(config)


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_what_is_refused_is_what_kernels_refuse(change: dict[str, int]) -> None:
    config = dataclasses.replace(FEW, **change)  # type: ignore[arg-type]
    (field,) = change
    assert any(sentence.startswith(field) for sentence in refusals(config))
    with pytest.raises((ValueError, TypeError, AssertionError)):
        _construct(config)


def test_the_releases_are_taken_and_every_limit_is_tried() -> None:
    assert not [*refusals(FLASH), *refusals(PRO)]
    tried = {field for change in (*REFUSED, NOT_ASKED) for field in change}
    assert tried == {limit.field for limit in LIMITS}
    for field, value in NOT_ASKED.items():
        config = dataclasses.replace(FEW, **{field: value})  # type: ignore[arg-type]
        assert any(one.startswith(f"{field} is {value}, the GPU's") for one in refusals(config))
