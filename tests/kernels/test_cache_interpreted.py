"""Kernels of caches and the indexer, run by the interpreter, against their references."""

from __future__ import annotations

import dataclasses
import re

import pytest

from dsv4.formats.model.config import AttentionKind
from dsv4.formats.model.releases import FLASH
from dsv4.kernels.ops.indexer import contract as indexer
from dsv4.kernels.ops.indexer.inputs import Rows, coarse
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.ops.kv_cache import q_rope_contract
from dsv4.kernels.ops.kv_cache.contract import Layer, Run
from tests.support.interpreter.run import configured, faults

STEPS = {
    "window wraps": (AttentionKind.SLIDING, [Run(1, 131, 2), Run(0, -1)]),
    "entries of two sequences": (AttentionKind.CSA, [Run(1, 5, 3), Run(0, 0, 4)]),
    "an entry of 128 tokens": (AttentionKind.HCA, [Run(1, 126, 2)]),
}


@pytest.mark.parametrize("name", STEPS)
def test_append(name: str) -> None:
    kind, runs = STEPS[name]
    assert faults(append.case(Layer.of(FLASH, kind), name, "none", runs, slots=2), "sm_90a") == []


def test_the_norm_of_a_draft() -> None:
    """Of rows that are not there: caches stay as they are."""
    wide = dataclasses.replace(Layer.of(FLASH, AttentionKind.SLIDING), latent=FLASH.hidden_size)
    assert faults(append.case(wide, "norm", "none", [Run(0, -1)] * 2), "sm_90a") == []


def test_query_heads() -> None:
    config = dataclasses.replace(FLASH, num_attention_heads=8)
    assert faults(q_rope_contract.case(config, "few", "none", (0, 9000)), "sm_90a") == []


def test_scores_and_choice() -> None:
    places = Rows((2078, 40), (1, 0))  # 519 of 524 keys, and fewer than are chosen
    one = indexer.case(FLASH, "few", "none", places, 524, coarse)
    scores, choice = one.launches
    few = configured(dataclasses.replace(one, launches=(scores,)), ctas=4)
    assert faults(dataclasses.replace(few, launches=(*few.launches, choice)), "sm_90a") == []


def test_choice_in_parts() -> None:
    """Rows that see one of three parts, and two."""
    one = indexer.choice_case(FLASH, "few", "none", (8000, 17000), 8504, "few values")
    assert faults(one, "sm_90a") == []


def test_what_is_not_visible_is_not_chosen() -> None:
    one = indexer.choice_case(FLASH, "few", "none", (2051,), 1024, "ascending")
    assert faults(one, "sm_90a") == []


def test_a_copy_that_is_not_waited_for_is_caught() -> None:
    def alter(ptx: str) -> str:
        return re.sub(r"cp\.async\.wait_group[^;]*;", "", ptx)

    one = append.case(Layer.of(FLASH, AttentionKind.CSA), "altered", "none", [Run(0, 7)])
    assert faults(one, "sm_90a", 0, alter) != []
