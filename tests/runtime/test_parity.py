"""The forward pass against transformers, in float32, on the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.model import load
from tests.runtime.agreement import (
    FLOAT32_TOLERANCE,
    chosen_by_others,
    deviation,
    expert_gaps,
    token_errors,
)
from tests.runtime.in_memory import InMemoryWeights, Packing, fp8, nvfp4, plain
from tests.runtime.official_oracle import official_model
from tests.runtime.small_models import (
    ODD_SHAPED,
    REAL_SHAPED,
    TRANSFORMERS_TINY,
    random_ids,
    random_weights,
)
from tests.runtime.transformers_oracle import run, transformers_logits, transformers_model

# Past three HCA blocks; neither a multiple of 4 nor of 128.
TOKENS = 423

CONFIGS = {"real": REAL_SHAPED, "odd": ODD_SHAPED, "transformers": TRANSFORMERS_TINY}


def logits_of(weights: InMemoryWeights, ids: Tensor, **options: object) -> Tensor:
    return load(weights, **options).session(len(ids)).forward(ids)  # type: ignore[arg-type]


def deviation_of_clear_tokens(weights: InMemoryWeights, ids: Tensor, expected: Tensor) -> float:
    """Of the tokens, nearly all, none of whose experts is chosen by a hair's breadth."""
    with expert_gaps() as gaps:
        found = logits_of(weights, ids)
    clear = torch.stack(gaps).amin(0) > 1e-5  # as the indexers' choices may be apart, below
    assert clear.float().mean() > 0.98
    return deviation(found[clear], expected[clear])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_plain_weights(config: ModelConfig) -> None:
    weights = random_weights(config)
    ids = random_ids(config, TOKENS)
    expected = transformers_logits(config, weights, ids)
    found = deviation_of_clear_tokens(InMemoryWeights(config, weights), ids, expected)
    assert found < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("config", "experts", "dense"),
    [
        (REAL_SHAPED, nvfp4, fp8),
        (ODD_SHAPED, nvfp4, nvfp4),
        (TRANSFORMERS_TINY, plain, fp8),
        (TRANSFORMERS_TINY, nvfp4, nvfp4),
    ],
    ids=["real", "odd", "transformers-fp8", "transformers-nvfp4"],
)
def test_packed_weights(config: ModelConfig, experts: Packing, dense: Packing) -> None:
    """The oracle gets the values that survived quantisation; the runtime gets the packed bytes."""
    packed = InMemoryWeights(
        config, random_weights(config, seed=1), expert_packing=experts, dense_packing=dense
    )
    ids = random_ids(config, TOKENS, seed=1)
    expected = transformers_logits(config, packed.held, ids)
    assert deviation_of_clear_tokens(packed, ids, expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TRANSFORMERS_TINY, index_topk=2),
        dataclasses.replace(REAL_SHAPED, index_topk=24),
    ],
    ids=["transformers", "real"],
)
def test_indexer_picks_what_transformers_picks(config: ModelConfig) -> None:
    """Few blocks to choose: choices may differ among equal scores only, and then the rest agrees.

    Exact ties are common: a block whose dot products are all negative scores zero.
    """
    weights = random_weights(config, seed=2)
    ids = random_ids(config, TOKENS, seed=2)
    expected, choices = run(transformers_model(config, weights), ids)
    with chosen_by_others(choices) as gaps:
        found = logits_of(InMemoryWeights(config, weights), ids)
    assert len(gaps) >= len(choices) > 0
    assert torch.cat(gaps).max() < 1e-5
    assert deviation(found, expected) < FLOAT32_TOLERANCE


def test_past_2048_tokens_where_the_real_top_k_starts_to_choose() -> None:
    config = dataclasses.replace(
        REAL_SHAPED,
        num_hidden_layers=3,
        compress_ratios=(128, 4, 4),
        num_hash_layers=0,
        head_dim=64,
        qk_rope_head_dim=32,
        index_head_dim=64,
        index_topk=512,
    )
    weights = random_weights(config, seed=3)
    ids = random_ids(config, 2200, seed=3)
    expected, choices = run(transformers_model(config, weights), ids)
    assert choices[0].shape == (2200, 512)
    with chosen_by_others(choices) as gaps:
        found = logits_of(InMemoryWeights(config, weights), ids)
    assert torch.cat(gaps).max() < 1e-5
    assert deviation(found, expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TRANSFORMERS_TINY, index_topk=16),
        dataclasses.replace(ODD_SHAPED, index_topk=16),
    ],
    ids=["transformers", "odd"],
)
def test_official_numerics(config: ModelConfig) -> None:
    """Against transformers with the official roundings added by ml_dtypes.

    Both round the same values to within 1e-6, but where one lies that near to a rounding
    boundary they part by a whole FP8 step (up to 6 %), and later tokens see it. So early tokens
    must agree to FP32, all must be much nearer to each other than to unrounded arithmetic, and
    the indexers must pick the same blocks, which takes the same Hadamard rotation and FP4.
    """
    packed = InMemoryWeights(
        config, random_weights(config, seed=4), expert_packing=nvfp4, dense_packing=fp8
    )
    ids = random_ids(config, TOKENS, seed=4)
    expected, choices = run(official_model(config, packed.held), ids)
    with chosen_by_others(choices) as gaps:
        found = logits_of(packed, ids, numerics=Numerics.OFFICIAL)
    rounded = token_errors(found, expected)
    unrounded = token_errors(logits_of(packed, ids), expected)
    assert rounded.quantile(0.1) < 1e-6
    assert rounded.median() < 0.2 * unrounded.median()
    assert unrounded.quantile(0.1) > 0.01
    assert (torch.cat(gaps) < 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16(config: ModelConfig) -> None:
    """BF16 rounds to 8 bits: an error of at most 2^-8 at each of about 16 roundings a layer.

    Independent roundings add in quadrature, so a typical token is off by less than
    2^-8 · sqrt(16 · layers); single tokens may be off by far more, where an expert flips.
    """
    weights = {
        name: t.bfloat16().float() if t.is_floating_point() and "hc_" not in name else t
        for name, t in random_weights(config, seed=5).items()
    }
    ids = random_ids(config, TOKENS, seed=5)
    expected = transformers_logits(config, weights, ids)
    found = logits_of(InMemoryWeights(config, weights), ids, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    errors = token_errors(found, expected)
    assert 1e-3 < errors.median() < 2**-8 * (16 * config.num_hidden_layers) ** 0.5
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
