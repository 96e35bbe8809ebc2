"""The router: the contract's reference, what the check catches, the kernel run and read."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.kernels.core.contract import Case
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.router.contract import SIZES, Shape, case, checks, router
from tests.support.interpreter.run import faults, interpret
from tests.support.machine_code import machine_code

SCORE = Shape("bf16", 128, 512, 6, hashed=False, scaling=1.5, warps=2)
HASH = dataclasses.replace(SCORE, hashed=True, vocab=50)
NVFP4 = dataclasses.replace(SCORE, kind="nvfp4")


def _buffers(one: Case) -> dict[str, Tensor]:
    return one.make(torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", [SCORE, HASH], ids=["score", "hash"])
def test_the_contract_is_the_models_formula(shape: Shape) -> None:
    one = case(shape, "none", 7)
    buffers = _buffers(one)
    logits = buffers["x"].double() @ buffers["codes"].double().T
    affinity = functional.softplus(logits).sqrt()
    if shape.hashed:
        idx = buffers["tid2eid"][buffers["ids"].long()]
    else:
        idx = (affinity + buffers["bias"]).topk(6, sorted=True).indices
    weights = affinity.gather(1, idx)
    weights = weights / weights.sum(1, keepdim=True) * 1.5
    expected = one.expect(buffers)
    assert torch.equal(expected["topk_idx"].value, idx)
    torch.testing.assert_close(expected["topk_weights"].value, weights.float(), rtol=1e-6, atol=0)


def test_the_check_catches_a_wrong_expert_and_a_wrong_weight() -> None:
    one = case(SCORE, "none", 4)
    expected = one.expect(_buffers(one))
    idx, weights = expected["topk_idx"], expected["topk_weights"]
    assert fault("topk_idx", idx.value.flip(1), idx) is not None
    assert fault("topk_weights", weights.value * (1 + 1e-3), weights) is not None
    assert fault("topk_weights", weights.value * (1 + 1e-7), weights) is None


def test_equal_experts_are_taken_in_order() -> None:
    for shape in (SCORE, NVFP4):
        one = case(shape, "none", 4, "equals", equals=True)
        buffers = _buffers(one)
        idx = one.expect(buffers)["topk_idx"].value
        first = idx[:, :1]
        assert bool((first % 2 == 0).all())
        assert bool((first < 64).all())
        assert torch.equal(idx[:, :4], first + torch.tensor([0, 1, 64, 65]))


RUNS = {
    "score": (SCORE, 3),
    "score, two groups": (SCORE, 10),
    "hash": (HASH, 1),
    "nvfp4": (NVFP4, 3),
    "nvfp4 hash": (dataclasses.replace(HASH, kind="nvfp4"), 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_kernel_run(name: str) -> None:
    shape, rows = RUNS[name]
    assert faults(case(shape, "none", rows), "sm_90a") == []


ODD = {  # experts, top_k, kind, hashed, rows
    "a tile that is not full": (96, 1, "bf16", False, 3),
    "a second tile of one band": (160, 4, "nvfp4", False, 2),
    "a warp that is not full": (216, 16, "bf16", False, 10),
    "most of all": (512, 16, "nvfp4", False, 2),
    "fewest, all of them chosen": (8, 8, "nvfp4", False, 2),
    "by a table": (216, 4, "nvfp4", True, 2),
}


@pytest.mark.parametrize("name", ODD)
def test_any_number_of_experts(name: str) -> None:
    experts, top_k, kind, hashed, rows = ODD[name]
    shape = dataclasses.replace(HASH if hashed else SCORE, experts=experts, top_k=top_k, kind=kind)
    assert faults(case(shape, "none", rows), "sm_90a") == []


def test_an_expert_that_is_not_there_is_never_chosen() -> None:
    """Scores of 216 experts far below zero: what fills up the last warp must not beat them."""
    shape = dataclasses.replace(SCORE, experts=216, top_k=16)
    one = case(shape, "none", 2)
    buffers = _buffers(one)
    buffers["bias"] -= 1e30
    interpret(one.launches[0].kernel, "sm_90a", buffers)
    assert all(0 <= expert < 216 for expert in buffers["topk_idx"].flatten().tolist())
    assert all(len(set(row)) == 16 for row in buffers["topk_idx"].tolist())


@pytest.mark.parametrize("name", ["zeros", "vanishing", "equals"])
def test_unusual_logits(name: str) -> None:
    one = case(SCORE, "none", 3, name, SIZES.get(name, 1.0), equals=True)
    assert faults(one, "sm_90a") == []


def test_a_token_alone_and_beside_others() -> None:
    one = case(SCORE, "none", 3)
    kernel = one.launches[0].kernel
    together = _buffers(one)
    rows = {argument.name for argument in kernel.leaves() if argument.shape[:1] == ("rows",)}
    alone = {n: t[1:2].clone() if n in rows else t for n, t in together.items()}
    interpret(kernel, "sm_90a", together)
    interpret(kernel, "sm_90a", alone)
    for name in ("topk_idx", "topk_weights"):
        assert torch.equal(together[name][1].view(torch.uint8), alone[name][0].view(torch.uint8))


ALTERATIONS = {
    "weights are not waited for": (r"cp\.async\.wait_group[^;]*;", 0, ""),
    "an operand is taken twice": (r"\{(%r\d+),%r\d+\}, (?=\{[^}]*\};)", 7, r"{\1,\1}, "),
    "a letter is not emptied": (r"\{[^}]*st\.relaxed\.gpu\.global\.b32[^}]*\}", -1, ""),
    "the last of equal ones": (r"redux\.sync\.min", 3, "redux.sync.max"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    pattern, which, instead = ALTERATIONS[name]

    def alter(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + found.expand(instead) + ptx[found.end() :]

    assert faults(case(SCORE, "none", 1, "equals", equals=True), "sm_90a", alter=alter)


def test_checks_cover_every_number_of_rows() -> None:
    rows = {one.rows for config in (FLASH, PRO) for one in checks(config, "model")}
    assert rows | {1, 2, 4, 8} >= set(range(1, 9))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_machine_code(kind: str, hashed: bool, arch: str) -> None:
    code = machine_code(router(Shape.of(PRO if hashed else FLASH, hashed, kind)), arch)
    assert f".target {arch}" in code.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.ptx
    assert code.ptx.index("cp.async.cg") < code.ptx.index("griddepcontrol.wait")
    assert code.spilled == 0
