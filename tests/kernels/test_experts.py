"""Routed experts: the contract's reference and bounds, what the check catches, the machine code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.formats.numeric.operands import INTERLEAVE, Nvfp4Matrix
from dsv4.kernels.core.bounds import chained, mma_order, rounded_range
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.core.sizes import SHARED_BYTES
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.experts import contract as operation
from dsv4.kernels.ops.experts import reference
from dsv4.kernels.ops.experts.contract import Shape, case, cases, checks, experts
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.moe import routed_experts, split_gate_up, swiglu
from tests.support.interpreter.run import faults, shared_bytes
from tests.support.machine_code import machine_code

SMALL = Shape(1024, 1024, experts=5, top_k=3, limit=10.0)
CHAINS = 8
CHOICES = torch.tensor([[4, 0, 2], [1, 2, 0], [2, 3, 4]])


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The stacks of `buffers` as the reference reads them."""

    buffers: Buffers
    interleave: int = INTERLEAVE

    def __len__(self) -> int:
        return SMALL.experts

    def w13(self, expert: int) -> Nvfp4Matrix:
        return reference.operand(SMALL, self.buffers, "13", expert)

    def w2(self, expert: int) -> Nvfp4Matrix:
        return reference.operand(SMALL, self.buffers, "2", expert)


@pytest.fixture(scope="module")
def buffers() -> Buffers:
    return case(SMALL, "none", CHOICES).make(torch.Generator().manual_seed(3))


def _reference(buffers: Buffers) -> Tensor:
    """The reference's own parts; its activations between them are float32, as the kernel's."""
    stack, y = _Stack(buffers), torch.zeros(3, SMALL.hidden, dtype=torch.float64)
    for token, row in enumerate(buffers["topk_idx"].tolist()):
        for place, expert in enumerate(row):
            x = buffers["x"][token]
            gate_up = linear(x[None], stack.w13(expert), dtype=torch.float32)
            act = swiglu(*split_gate_up(gate_up, stack.interleave), SMALL.limit)
            h = (act * buffers["topk_weights"][token, place]).to(torch.bfloat16)
            y[token] += linear(h, stack.w2(expert), dtype=torch.float32)[0]
    return y


def test_the_contract_is_the_reference(buffers: Buffers) -> None:
    expected = reference.expected(SMALL, buffers, CHAINS)["y"]
    assert fault("y", _reference(buffers), expected) is None


def test_the_contract_is_the_routed_experts_of_the_model(buffers: Buffers) -> None:
    """Without roundings of activations, which the model's CPU path has at other places."""
    y = routed_experts(
        buffers["x"].to(torch.float32),
        buffers["topk_idx"].to(torch.int64),
        buffers["topk_weights"],
        _Stack(buffers),
        limit=SMALL.limit,
    )
    value = reference.expected(SMALL, buffers, CHAINS)["y"].value
    error = (y - value).std() / value.std()
    assert error < 2.0**-8


def test_the_bound_is_tight(buffers: Buffers) -> None:
    """Far below one rounding of every activation, and below any fault worth the name."""
    value, bound = reference.expected(SMALL, buffers, CHAINS)["y"]
    assert isinstance(bound, Tensor)
    assert float(bound.mean() / value.std()) < 2e-3
    faults = {
        "an expert's weight": value * (1 + 2.0**-6),
        "another token's row": value.roll(1, 0),
        "bfloat16": value.to(torch.bfloat16),
    }
    for name, wrong in faults.items():
        assert fault(name, wrong.to(torch.float32), Expected(value, bound)) is not None


def test_experts_that_are_not_here_choose_nothing(buffers: Buffers) -> None:
    idx = buffers["topk_idx"].clone()
    idx[0, 0], idx[2] = -1, SMALL.experts
    value, _ = reference.expected(SMALL, buffers | {"topk_idx": idx}, CHAINS)["y"]
    assert not value[2].any()
    without = buffers["topk_weights"].clone()
    without[0, 0] = 0
    again = reference.expected(SMALL, buffers | {"topk_weights": without}, CHAINS)["y"]
    assert torch.equal(value[:2], again.value[:2])


def test_the_clamp_bites_and_a_weight_of_zero_is_there(buffers: Buffers) -> None:
    w13 = reference.operand(SMALL, buffers, "13", 4)
    plain = reference.matrix(SMALL, buffers, "13", 4) @ buffers["x"][0].to(torch.float64)
    gates = plain.view(-1, 2, INTERLEAVE)[:, 0] * w13.global_scales[0]
    assert 0.001 < float((gates > SMALL.limit).to(torch.float64).mean()) < 0.3
    assert (buffers["topk_weights"] == 0).any()


def test_mma_order_is_what_the_operand_pairs() -> None:
    order = mma_order(256, "nvfp4")
    assert order.sort().values.tolist() == list(range(256))
    assert order[:16].tolist() == [t * 32 + i for t in range(4) for i in (0, 1, 4, 5)]
    assert order[16:32].tolist() == [t * 32 + i for t in range(4) for i in (2, 3, 6, 7)]


def test_chained_bounds_float32_sums() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2048, generator=rng).to(torch.bfloat16).to(torch.float64)
    weight = torch.randn(64, 2048, generator=rng).to(torch.bfloat16).to(torch.float64)
    value, error = chained(x, weight, 8, "nvfp4")
    torch.testing.assert_close(value, weight @ x)
    single = torch.zeros(64, dtype=torch.float32)
    for chain in (
        (weight * x)[:, mma_order(2048, "nvfp4")].to(torch.float32).view(64, 8, -1).unbind(1)
    ):
        single += chain.cumsum(1)[:, -1]
    assert bool(((single.to(torch.float64) - value).abs() <= error).all())
    assert float((error / value.abs()).median()) < 5e-5


def test_a_rounding_moves_only_near_a_boundary() -> None:
    value = torch.tensor([1.0, 1.0 + 2.0**-8, 3.0], dtype=torch.float64)
    middle, spread = rounded_range(value, torch.full_like(value, 2.0**-12))
    assert middle.tolist() == [1.0, 1.0, 3.0]
    assert spread.tolist() == [0.0, 2.0**-7, 0.0]


def test_cases_count_the_bytes_of_the_experts_that_were_chosen() -> None:
    one, eight, both, _ = cases(FLASH, "flash", (1, 8))
    assert one.nbytes == 6 * 3 * 4096 * 2048 * 9 // 16 + 4096 * 6 + 48
    assert both.nbytes - one.nbytes == 3 * (4096 * 2048 + 32 * 16)
    chosen = operation.random_choices(FLASH, 8)
    assert eight.nbytes // (3 * 4096 * 2048 * 9 // 16) == len(set(chosen.flatten().tolist()))
    assert all(len(set(row.tolist())) == 6 for row in chosen)
    for config in (FLASH, PRO):
        assert len(list(checks(config, "any"))) > 20


KIBIBYTES = {"flash": 40, "flash, shared": 64, "pro": 56, "pro, shared": 100}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("model", KIBIBYTES)
def test_machine_code(model: str, arch: str) -> None:
    """In a model's step the instruction cache holds other kernels: the code has to be small."""
    config = FLASH if "flash" in model else PRO
    code = machine_code(experts(Shape.of(config, "shared" in model)), arch)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.ptx
    assert "cp.async.cg.shared.global.L2::256B" in code.ptx
    assert code.spilled == 0
    assert code.nbytes < KIBIBYTES[model] * 1024


def test_the_kernel_is_right_where_it_is_interpreted() -> None:
    """The smallest shape, as one CTA: an expert, the shared one, and a token that chose none."""
    shape = Shape(1024, 1024, experts=1, top_k=1, limit=10.0, shared=True)
    assert faults(case(shape, "none", torch.tensor([[0], [-1]])), "sm_90a") == []


@pytest.mark.long
def test_the_last_of_sixteen_choices_of_the_last_token_is_found() -> None:
    shape = Shape(1024, 1024, experts=2, top_k=16, limit=10.0)
    choices = torch.full((8, 16), -1)
    choices[0, 0], choices[4, 8], choices[7, 15] = 0, 1, 1
    assert faults(case(shape, "none", choices), "sm_90a") == []


@pytest.mark.parametrize("model", ["flash", pytest.param("pro", marks=pytest.mark.long)])
def test_sixteen_experts_a_token_find_room(model: str) -> None:
    config = dataclasses.replace(FLASH if model == "flash" else PRO, num_experts_per_tok=16)
    shape = dataclasses.replace(Shape.of(config, shared=True), experts=1)
    one = case(shape, "none", torch.full((1, 16), -1), out="bfloat16")
    kernel, buffers = one.launches[0].kernel, one.make(torch.Generator().manual_seed(3))
    assert machine_code(kernel, "sm_90a").spilled == 0
    assert 200 << 10 < shared_bytes(kernel, "sm_90a", buffers) <= SHARED_BYTES
