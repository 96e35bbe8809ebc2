"""The indexer: the contract's reference, its bounds, the machine code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.formats.numeric.codecs import e2m1_decode, e8m0_decode, unpack_nibbles
from dsv4.kernels.core.contract import Buffers, Case
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.indexer.contract import (
    case,
    cases,
    checks,
    choice_case,
    index_scores,
    merge_topk,
    part_topk,
)
from dsv4.kernels.ops.indexer.inputs import Rows, Values, coarse, equal, normal, wide
from dsv4.kernels.ops.indexer.reference import queries
from dsv4.kernels.reference.indexer import hadamard
from dsv4.kernels.reference.indexer import index_scores as reference_scores
from dsv4.kernels.reference.quant_sim import INDEXER_BLOCK, fake_quant_fp4
from dsv4.kernels.reference.rope import apply_rope
from tests.support.machine_code import machine_code

PLACES = Rows((2100, -1, 2047, 2300, 2303), (1, 0, 0, 0, 1))
CAPACITY = 576


def _buffers(one: Case) -> Buffers:
    return one.make(torch.Generator().manual_seed(7))


def _by_reference_operations(buffers: Buffers) -> tuple[Tensor, list[Tensor]]:
    """Query heads, and each row's scores of its visible keys."""
    position = buffers["position"].long().clamp(min=0)
    heads = buffers["q"].view(-1, FLASH.index_n_heads, FLASH.index_head_dim)
    turned = apply_rope(
        heads.to(torch.float32), buffers["cos"][position], buffers["sin"][position]
    ).to(torch.bfloat16)
    q = fake_quant_fp4(hadamard(turned), INDEXER_BLOCK)
    scale = FLASH.index_head_dim**-0.5 * FLASH.index_n_heads**-0.5
    weights = buffers["weights"].to(torch.bfloat16) * scale
    scores = []
    for row, slot in enumerate(buffers["slot"].tolist()):
        seen = (int(buffers["position"][row]) + 1) // FLASH.csa_ratio
        values = e2m1_decode(unpack_nibbles(buffers["keys"][slot, :seen]))
        powers = e8m0_decode(buffers["key_scales"][slot, :seen])
        keys = values * powers.repeat_interleave(INDEXER_BLOCK, -1)
        scores.append(reference_scores(q[row : row + 1], weights[row : row + 1], keys)[0])
    return q, scores


@pytest.mark.parametrize("values", [coarse, equal, normal, wide])
def test_scores_are_the_reference_operations(values: Values) -> None:
    buffers = _buffers(one := case(FLASH, "test", "none", PLACES, CAPACITY, values))
    q, scores = _by_reference_operations(buffers)
    found, off = queries(FLASH, buffers)
    sure = off == 0
    assert sure.to(torch.float32).mean() > 0.95
    assert torch.equal(found[sure], q.to(torch.float64)[sure])
    expected = one.expect(buffers)
    whole = buffers["scores"].clone()
    for row, score in enumerate(scores):
        if len(score) > FLASH.index_topk:
            whole[row, : len(score)] = score
    assert fault("scores", whole, expected["scores"]) is None
    assert ("blocks" in expected) == (values in (coarse, equal))
    if "blocks" in expected:
        for row, score in enumerate(scores):
            best = score.sort(descending=True, stable=True).indices[: FLASH.index_topk]
            padded = [*sorted(best.tolist()), *[-1] * (FLASH.index_topk - len(best))]
            assert expected["blocks"].value[row].tolist() == padded


def test_the_bound_admits_float32_sums_and_nothing_coarser() -> None:
    buffers = _buffers(one := case(FLASH, "test", "none", PLACES, CAPACITY, normal))
    expected = one.expect(buffers)["scores"]
    assert fault("scores", expected.value.to(torch.float32), expected) is None
    assert fault("scores", expected.value.to(torch.bfloat16), expected) is not None


@pytest.mark.parametrize("kind", ["normal", "few values", "extreme", "alike", "ascending"])
def test_a_choice_leaves_out_nothing_better(kind: str) -> None:
    one = choice_case(FLASH, "test", "none", (2051, 5000, 8191), 2048, kind)
    buffers = _buffers(one)
    expected = one.expect(buffers)["blocks"]
    for row, at in enumerate((2051, 5000, 8191)):
        scores, chosen = buffers["scores"][row], expected.value[row].long()
        assert bool((chosen.diff() > 0).all()) and int(chosen.max()) < (at + 1) // FLASH.csa_ratio
        rest = torch.ones((at + 1) // FLASH.csa_ratio, dtype=torch.bool)
        rest[chosen] = False
        worst = scores[chosen].min()
        assert not bool((scores[: len(rest)][rest] > worst).any())
        ties = chosen[scores[chosen] == worst]  # the lowest blocks of those
        assert not bool((scores[: int(ties.max())][rest[: int(ties.max())]] == worst).any())
    wrong = expected.value.clone()
    wrong[2, 3] += 1
    assert fault("blocks", wrong, expected) is not None


def test_cases_and_checks_cover_both_models() -> None:
    for config, name in ((FLASH, "flash"), (PRO, "pro")):
        shapes = [str(one) for one in (*cases(config, name, (1, 8)), *checks(config, name))]
        assert f"indexer 128k {name} rows 8" in shapes
        assert len(set(shapes)) == len(shapes) > 40


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_machine_code_of_scores(arch: str) -> None:
    code = machine_code(index_scores(FLASH), arch)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.ptx
    assert "cp.async.cg.shared.global" in code.ptx
    assert code.spilled == 0
    assert code.resources["REG"] <= 255


@pytest.mark.parametrize("topk", [part_topk, merge_topk])
def test_machine_code_of_the_choice(topk: Callable[..., Kernel]) -> None:
    code = machine_code(topk(PRO, turns=8, part=16384), "sm_90a")
    assert code.spilled == 0
    assert code.resources["REG"] <= 128  # 512 threads of a CTA
