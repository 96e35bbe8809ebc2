"""Products for many tokens: the contract's references and bounds, the machine code, its meaning."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.formats.numeric.operands import INTERLEAVE, Nvfp4Matrix
from dsv4.kernels.core.bounds import blocked
from dsv4.kernels.core.contract import Buffers, Case, Expected
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.experts import reference
from dsv4.kernels.ops.experts.contract import Shape
from dsv4.kernels.ops.gemv import contract as gemv
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.kernels.ops.prefill import experts_contract, gemm_contract
from dsv4.kernels.ops.prefill.experts_reference import expected
from dsv4.kernels.ops.prefill.weight_fragments import arranged_column
from dsv4.kernels.reference.moe import routed_experts
from tests.support.interpreter.alterations import WAIT, instead, without
from tests.support.interpreter.run import Alteration, faults
from tests.support.machine_code import machine_code

SMALL = Shape(256, 1024, experts=3, top_k=2, limit=10.0)
NARROW = dataclasses.replace(SMALL, hidden=128)
CUT = {"warpgroups": 2, "m_each": 1, "n_tile": 32, "runs": 2, "stages": 2}
WEIGHTS = {
    "nvfp4": Weight("nvfp4", 128, 512, slabs=2),
    "fp8": Weight("fp8", 256, 384),
    "fp8, groups": Weight("fp8", 256, 128, groups=2),
    "bf16": Weight("bf16", 128, 256),
}


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


def _buffers(one: Case) -> Buffers:
    return one.make(torch.Generator().manual_seed(3))


def _few(rng: torch.Generator, rows: int, shape: Shape) -> Tensor:
    """Expert 1 is empty, the first token has one expert only."""
    chosen = torch.tensor([0, 2], dtype=torch.int32).repeat(rows, 1)
    chosen[::2] = chosen[::2].flip(1)
    chosen[0, 0] = -1
    return chosen


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_is_that_of_few_rows(name: str, hard: bool) -> None:
    one = gemm_contract.case(WEIGHTS[name], name, "none", 8, "float32", hard=hard)
    buffers = _buffers(one)
    few = gemv.case([WEIGHTS[name]], name, "none", 8)
    renamed = {f"{n}0": buffers[n] for n in ("codes", "scales", "global_scale") if n in buffers}
    other = few.expect({"x": buffers["x"], **renamed, "y0": buffers["y"]})["y0"]
    found = one.expect(buffers)["y"]
    torch.testing.assert_close(found.value, other.value, rtol=1e-12, atol=1e-300)
    if not hard:
        assert fault("y", found.value.to(torch.float32), found) is None
        assert fault("y", found.value.to(torch.bfloat16), found) is not None


def test_the_experts_are_those_of_the_model() -> None:
    """Without roundings of activations, which the model's CPU path has at other places."""
    buffers = _buffers(experts_contract.case(SMALL, "none", 20))
    y = routed_experts(
        buffers["x"][:, 0].to(torch.float32),
        buffers["topk_idx"].to(torch.int64),
        buffers["topk_weights"],
        _Stack(buffers),
        limit=SMALL.limit,
    )
    value, bound = expected(SMALL, buffers)
    assert float((y - value).std() / value.std()) < 2.0**-8
    assert isinstance(bound, Tensor)
    assert float(bound.mean() / value.std()) < 2.0**-7
    wrong = value.clone()
    wrong[3] = value[4]
    assert "(3, 0)" in str(fault("y", wrong, Expected(value, bound)))


def test_blocked_bounds_float32_sums() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2048, generator=rng).to(torch.bfloat16).to(torch.float64)
    weight = torch.randn(64, 2048, generator=rng).to(torch.bfloat16).to(torch.float64)
    value, error = blocked(x, weight)
    torch.testing.assert_close(value, x @ weight.T)
    single = (x[:, None] * weight).to(torch.float32).cumsum(-1)[..., -1]
    assert bool(((single.to(torch.float64) - value).abs() <= error).all())
    assert float((error / value.abs()).median()) < 2e-3


def test_arranged_columns_are_all_columns() -> None:
    assert sorted(arranged_column(place) for place in range(64)) == list(range(64))


def test_cases_cover_every_dense_matrix_of_both_models() -> None:
    for config in (FLASH, PRO):
        shapes = {(w.kind, w.n, w.k) for w in gemm_contract.weights_of(config).values()}
        heads = config.num_attention_heads * config.head_dim
        assert ("fp8", heads, config.q_lora_rank) in shapes
        assert ("nvfp4", config.moe_intermediate_size, config.hidden_size) in shapes
        assert len(list(gemm_contract.cases(config, "any", (8, 512)))) == len(
            gemm_contract.weights_of(config)
        )
    (one,) = experts_contract.cases(FLASH, "flash", (1, 8, 2048))
    assert one.flops == 2 * 2048 * 6 * 3 * 4096 * 2048
    assert one.nbytes > 256 * 3 * 4096 * 2048 * 9 // 16


KERNELS = {
    "w13, Flash": experts_contract.up(Shape.of(FLASH)),
    "w2, Flash": experts_contract.down(Shape.of(FLASH)),
    "w13, Pro": experts_contract.up(Shape.of(PRO)),
    "w13, Flash, many tokens": experts_contract.up(Shape.of(FLASH), experts_contract.MANY),
    "w2, Flash, many tokens": experts_contract.down(Shape.of(FLASH), experts_contract.MANY),
    "fp8": gemm_contract.gemm(Weight("fp8", 4096, 8192, 8)),
    "fp8, many rows": gemm_contract.gemm(Weight("fp8", 4096, 8192, 8), tuning=gemm_contract.WIDE),
    "nvfp4, many rows": gemm_contract.gemm(Weight("nvfp4", 2048, 4096), tuning=gemm_contract.WIDE),
    "bf16": gemm_contract.gemm(Weight("bf16", 64, 4096), "float32"),
}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, arch: str) -> None:
    kernel = KERNELS[name]
    code = machine_code(kernel, arch)
    whole = f"wgmma.mma_async.sync.aligned.m64n{_width(kernel)}k16.f32.bf16.bf16"
    assert (whole in code.ptx) == (arch == "sm_90a")
    assert ("mma.sync.aligned.m16n8k16" in code.ptx) == (arch == "sm_100a")
    assert "cp.async.bulk.tensor.3d.shared::cta.global" in code.ptx
    assert code.spilled == 0


def _width(kernel: Kernel) -> object:
    return dict(kernel.config)["n_tile"]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_interpreted(name: str, hard: bool) -> None:
    """One column tile is not full; the ring wraps."""
    out = "float32" if hard else "bfloat16"
    cut = {**CUT, "ctas": 2}
    one = gemm_contract.case(WEIGHTS[name], name, "none", 37, out, hard=hard, tuning=cut)
    assert faults(one, "sm_90a") == []


@pytest.mark.parametrize(("name", "hard"), [("nvfp4", True), ("bf16", False)])
def test_products_interpreted_where_warps_multiply_on_their_own(name: str, hard: bool) -> None:
    one = gemm_contract.case(WEIGHTS[name], name, "none", 37, hard=hard, tuning={**CUT, "ctas": 2})
    assert faults(one, "sm_100a") == []


def test_experts_interpreted() -> None:
    cut = {**CUT, "ctas": 2}
    one = experts_contract.case(NARROW, "none", 7, routing=_few, hard=True, tuning=cut)
    assert faults(one, "sm_90a") == []


@pytest.mark.parametrize("arch", [pytest.param("sm_90a", marks=pytest.mark.long), "sm_100a"])
def test_one_expert_interpreted(arch: str) -> None:
    """Twice for each token, in several tiles of tokens, the last one narrow."""
    cut = {**CUT, "ctas": 3, "runs": 1, "unroll": 2, "narrow": 1}
    routing = experts_contract.one_expert
    one = experts_contract.case(NARROW, "none", 20, "bfloat16", routing=routing, tuning=cut)
    assert faults(one, arch) == []


def test_the_cut_follows_the_number_of_tokens() -> None:
    flash = Shape.of(FLASH)
    found = [experts_contract.tuned(flash, rows)["n_tile"] for rows in (9, 2048, 8192)]
    assert found == [64, 64, 128]
    wide, small = Weight("fp8", 32768, 1024), Weight("fp8", 1024, 4096)
    assert [gemm_contract.tuned(wide, rows)["n_tile"] for rows in (9, 512, 2048)] == [128, 256, 256]
    assert [gemm_contract.tuned(small, rows)["n_tile"] for rows in (9, 512, 2048)] == [
        128,
        128,
        128,
    ]
    assert gemm_contract.tuned(Weight("bf16", 64, 4096), 8192)["n_tile"] == 128


ALTERATIONS = {
    "copies do not wait for room": ("sm_90a", without(WAIT, 0)),
    "copies are not waited for": ("sm_90a", without(WAIT, 1)),
    "products are not waited for": ("sm_90a", without(r"wgmma\.wait_group[^;]*;", 2)),
    "a product is missing": ("sm_90a", without(r"wgmma\.mma_async[^;]*;", 1)),
    "bytes are announced wrongly": ("sm_90a", instead(r"16384;", "16368;")),
    "a warp's copies are not waited for": ("sm_100a", without(WAIT, 1)),
    "one of a warp's products is missing": ("sm_100a", without(r"mma\.sync[^;]*;", 1)),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    assert _caught(*ALTERATIONS[name])


def _caught(arch: str, alter: Alteration) -> bool:
    """Whether some order of events shows it."""
    cut = {**CUT, "ctas": 1}
    one = gemm_contract.case(Weight("bf16", 128, 768), "altered", "none", 9, tuning=cut)
    for seed in range(6):
        try:
            if faults(one, arch, seed, alter):
                return True
        except (AssertionError, RuntimeError):
            return True
    return False
