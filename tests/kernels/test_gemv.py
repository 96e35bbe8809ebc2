"""Few-row products: the contract's reference, what the check catches, and the machine code."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.utils import from_blocked

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.kernels.core.contract import Case
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.gemv.contract import Weight, case, cases, gemv, tuned, weights_of
from tests.support.interpreter.run import faults
from tests.support.machine_code import machine_code

NVFP4 = Weight("nvfp4", 256, 512, slabs=2)
FP8 = Weight("fp8", 256, 512, slabs=2)
GROUPED = Weight("fp8", 256, 256, groups=2)
BF16 = Weight("bf16", 64, 256)


def _buffers(one: Case) -> dict[str, Tensor]:
    return one.make(torch.Generator().manual_seed(3))


def _slabs(codes: Tensor) -> Tensor:
    """[S, N, K/S] -> [N, K]."""
    return torch.cat(list(codes), 1)


def test_nvfp4_is_what_torchao_reads() -> None:
    one = case([NVFP4], "test", "none", 3)
    buffers = _buffers(one)
    values = _slabs(f4_unpacked_to_f32(unpack_uint4(buffers["codes0"])))
    scales = _slabs(
        torch.stack([from_blocked(slab.flatten(), 256, 16) for slab in buffers["scales0"]])
    ).view(torch.float8_e4m3fn)
    weight = values * scales.to(torch.float32).repeat_interleave(16, 1) * buffers["global_scale0"]
    product = buffers["x"][:, 0].to(torch.float64) @ weight.to(torch.float64).T
    torch.testing.assert_close(one.expect(buffers)["y0"].value, product, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [FP8, GROUPED], ids=str)
def test_fp8_is_what_torch_reads(weight: Weight) -> None:
    one = case([weight], "test", "none", 3)
    buffers = _buffers(one)
    values = _slabs(buffers["codes0"].view(torch.float8_e4m3fn).to(torch.float64))
    tiles = buffers["scales0"].view(torch.float8_e8m0fnu).to(torch.float64)
    matrix = values * tiles.repeat_interleave(128, 0).repeat_interleave(128, 1)
    x = buffers["x"].to(torch.float64)
    rows = weight.n // weight.groups
    parts = [x[:, g] @ matrix[g * rows : (g + 1) * rows].T for g in range(weight.groups)]
    torch.testing.assert_close(
        one.expect(buffers)["y0"].value, torch.cat(parts, 1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("weight", [NVFP4, FP8, GROUPED, BF16], ids=str)
def test_the_bound_admits_float32_sums_and_nothing_coarser(weight: Weight) -> None:
    one = case([weight], "test", "none", 8)
    expected = one.expect(_buffers(one))["y0"]
    assert fault("y0", expected.value.to(torch.float32), expected) is None
    assert fault("y0", expected.value.to(torch.bfloat16), expected) is not None
    altered = expected.value.to(torch.float32)
    altered[7, 5] = torch.nan
    assert "(7, 5)" in str(fault("y0", altered, expected))


def test_cases_cover_every_dense_matrix_of_both_models() -> None:
    for config in (FLASH, PRO):
        weights = [weight for group in weights_of(config).values() for weight in group]
        shapes = {(weight.n, weight.k) for weight in weights}
        heads = config.num_attention_heads * config.head_dim
        assert (config.vocab_size, config.hidden_size) in shapes
        assert (heads, config.q_lora_rank) in shapes
        assert (config.hidden_size, config.o_groups * config.o_lora_rank) in shapes
    lm_head = next(iter(cases(FLASH, "flash", (1,))))
    assert lm_head.nbytes == 129280 * 4096 * 9 // 16 + 4096 * 2 + 129280 * 4


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("shape", ["lm_head", "wo_b", "wq_a wkv CSA"])
def test_machine_code(shape: str, arch: str) -> None:
    code = machine_code(gemv(weights_of(FLASH)[shape]), arch)
    assert f".target {arch}" in code.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.ptx
    assert "cp.async.cg.shared.global" in code.ptx
    assert code.ptx.index("cp.async.cg") < code.ptx.index("griddepcontrol.wait")
    assert code.spilled == 0
    assert code.resources["REG"] <= 128  # two CTAs of 8 warps on a multiprocessor


def test_weights_that_differ_in_rows_share_code() -> None:
    weights = weights_of(FLASH)["wq_a wkv CSA"]
    assert len(weights) == 7
    one_of_each = machine_code(gemv([weights[0], weights[2]]), "sm_90a").nbytes
    assert machine_code(gemv(weights), "sm_90a").nbytes < 1.25 * one_of_each


MIXED = [
    Weight("fp8", 256, 256),
    Weight("bf16", 64, 256),
    Weight("fp8", 128, 256),
    Weight("bf16", 192, 256),
    Weight("nvfp4", 128, 256),
    Weight("bf16", 128, 256),
]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_weights_of_one_launch_interpreted(arch: str) -> None:
    cut = {"warps": 2, "stages": 2, "pdl": True}
    assert faults(case(MIXED, "mixed", "none", 3, cut), arch) == []


def test_a_kernel_that_takes_another_weight_is_caught() -> None:
    one = case([Weight("bf16", 128, 256)] * 2, "two", "none", 2, {"warps": 2, "stages": 2})
    assert faults(one, "sm_90a") == []

    def other(ptx: str) -> str:
        """Of two pointers, the wrong one."""
        choice = re.compile(r"selp\.b64(\s+\S+), (\S+), (\S+), ")
        altered, count = choice.subn(r"selp.b64\1, \3, \2, ", ptx, count=1)
        assert count
        return altered

    assert faults(one, "sm_90a", 0, other)


def test_the_cut_fills_waves() -> None:
    found = {name: tuned(weights) for name, weights in weights_of(FLASH).items()}
    assert (found["wq_b"]["warps"], found["wq_b"]["stages"]) == (2, 2)
    assert (found["wq_b indexer"]["warps"], found["wq_b indexer"]["stages"]) == (2, 3)
