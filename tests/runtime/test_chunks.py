"""Any cutting of a sequence into calls gives the same logits.

Sums are wide (`kernels/reference/accumulate.py`), so the logits are the same bit for bit where this
was written (AVX-512, MKL); asserted is agreement to 1e-5 of their spread.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime import session as session_module
from dsv4.runtime.model import Model, load
from tests.runtime.agreement import deviation
from tests.runtime.in_memory import InMemoryWeights, fp8, nvfp4
from tests.runtime.small_models import (
    ODD_SHAPED,
    REAL_SHAPED,
    TRANSFORMERS_TINY,
    random_ids,
    random_weights,
)

TOLERANCE = 1e-5

# Starts and ends at every place in a CSA block, around HCA block and window ends, and mixes
# single tokens with runs over several blocks.
RAGGED = (1, 2, 1, 3, 120, 1, 1, 5, 122, 127, 1, 1, 9, 1)

REAL = dataclasses.replace(
    REAL_SHAPED,
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128),
    index_topk=16,
)
ODD = dataclasses.replace(ODD_SHAPED, index_topk=9)

# All attention kinds in three layers, small enough to feed thousands of single tokens.
LONG = dataclasses.replace(
    TRANSFORMERS_TINY,
    num_hidden_layers=3,
    compress_ratios=(0, 128, 4),
    num_hash_layers=1,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=512,
)


@functools.cache
def packed(config: ModelConfig) -> InMemoryWeights:
    return InMemoryWeights(config, random_weights(config), expert_packing=nvfp4, dense_packing=fp8)


def in_chunks(model: Model, ids: Tensor, sizes: list[int]) -> Tensor:
    assert sum(sizes) == len(ids)
    session = model.session(len(ids))
    return torch.cat([session.forward(part) for part in torch.split(ids, sizes)])


def assert_chunks_agree(model: Model, ids: Tensor, cuts: list[list[int]]) -> None:
    whole = model.session(len(ids)).forward(ids)
    for sizes in cuts:
        assert deviation(in_chunks(model, ids, sizes), whole) < TOLERANCE, sizes


@pytest.mark.parametrize(
    ("config", "dtype", "numerics"),
    [
        (REAL, torch.float32, Numerics.EXACT),
        (REAL, torch.float32, Numerics.OFFICIAL),
        (REAL, torch.bfloat16, Numerics.OFFICIAL),
        (ODD, torch.float32, Numerics.OFFICIAL),
        (ODD, torch.bfloat16, Numerics.EXACT),
    ],
)
def test_one_pass_ragged_and_single(
    config: ModelConfig, dtype: torch.dtype, numerics: Numerics
) -> None:
    model = load(packed(config), dtype=dtype, numerics=numerics)
    ids = random_ids(config, sum(RAGGED))
    assert_chunks_agree(model, ids, [list(RAGGED), list(RAGGED[::-1])])
    assert_chunks_agree(model, ids[:132], [[1] * 132])


def test_internal_steps_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(InMemoryWeights(REAL_SHAPED, random_weights(REAL_SHAPED)))
    ids = random_ids(REAL_SHAPED, 300)
    whole = model.session(300).forward(ids)
    monkeypatch.setattr(session_module, "STEP_TOKENS", 37)
    assert deviation(model.session(300).forward(ids), whole) < TOLERANCE


def test_past_2048_tokens() -> None:
    """The real top-k of 512 starts to choose at token 2,051; decode across that place."""
    model = load(InMemoryWeights(LONG, random_weights(LONG)))
    ids = random_ids(LONG, 2200)
    assert_chunks_agree(
        model, ids, [[2040] + [1] * 30 + [130], [700, 700, 651, 1, 1, 1, 146], [2199, 1]]
    )


@pytest.mark.long
def test_past_2048_tokens_one_by_one() -> None:
    model = load(InMemoryWeights(LONG, random_weights(LONG)))
    ids = random_ids(LONG, 2200)
    assert_chunks_agree(model, ids, [[1] * 2200])


def test_a_shortened_state_shows() -> None:
    """The comparison notices a token that never reached the caches."""
    model = load(InMemoryWeights(ODD_SHAPED, random_weights(ODD_SHAPED)))
    ids = random_ids(ODD_SHAPED, 140)
    whole = model.session(140).forward(ids)
    session = model.session(140)
    session.forward(ids[:100])
    for cache in session.caches:
        cache.clear()
    assert deviation(session.forward(ids[100:]), whole[100:]) > 100 * TOLERANCE
