"""Hyper-connections: the contract's reference, what the check catches, the kernel run and read."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.kernels.core.contract import Case
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.hyper_connections.contract import (
    PLACES,
    SIZES,
    Output,
    Shape,
    case,
    cases,
    mhc,
)
from dsv4.kernels.reference.mhc import hc_head, mhc_post, mhc_pre
from dsv4.kernels.reference.norm import rms_norm
from tests.support.interpreter.run import faults, interpret
from tests.support.machine_code import machine_code

SMALL = Shape(512, 20, 1e-6, 1e-6, finish_warps=2)
TINY = Shape(256, 20, 1e-6, 1e-6, width=2, warps=8)
BOTH = Output("float32", 2)


def _buffers(one: Case) -> dict[str, Tensor]:
    return one.make(torch.Generator().manual_seed(3))


def _reference(place: str, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The proven operations, one after another."""
    if place == "first":
        ids = buffers["ids"].clamp(0, buffers["embed"].shape[0] - 1)
        streams = buffers["embed"][ids][:, None].expand(-1, 4, -1)
    else:
        u = sum(buffers[name] for name in ("u", "u1") if name in buffers)
        assert isinstance(u, Tensor)
        old = buffers["streams"], buffers["post"], buffers["comb"]
        streams = mhc_post(u.to(torch.bfloat16), *old)
    weights = buffers["fn"], buffers["base"], buffers["scale"]
    if place == "last":
        y = hc_head(streams, *weights, hc_eps=1e-6, norm_eps=1e-6)
        return {"new_streams": streams, "x": rms_norm(y, buffers["norm"], 1e-6)}
    y, post, comb = mhc_pre(streams, *weights, sinkhorn_iters=20, hc_eps=1e-6, norm_eps=1e-6)
    x = rms_norm(y, buffers["norm"], 1e-6)
    return {"new_streams": streams, "x": x, "new_post": post, "new_comb": comb}


@pytest.mark.parametrize("u", [Output(), BOTH], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_the_contract_is_the_reference(place: str, u: Output) -> None:
    one = case(SMALL, place, "none", 5, u=u)
    buffers = _buffers(one)
    expected = one.expect(buffers)
    for name, value in _reference(place, buffers).items():
        assert fault(name, value, expected[name]) is None


@pytest.mark.parametrize("place", PLACES)
def test_the_bounds_admit_no_coarser_mix(place: str) -> None:
    one = case(SMALL, place, "none", 5)
    buffers = _buffers(one)
    expected = one.expect(buffers)
    coarse = _reference(place, buffers | {"fn": buffers["fn"].to(torch.bfloat16).float()})
    for name in coarse.keys() & {"new_post", "new_comb"}:
        assert fault(name, coarse[name], expected[name]) is not None
    swapped = _reference(place, buffers | {"base": buffers["base"].flip(0)})
    assert fault("x", swapped["x"], expected["x"]) is not None


def test_the_bounds_tell_the_direction_of_comb() -> None:
    one = case(SMALL, "middle", "none", 2)
    buffers = _buffers(one)
    turned = _reference("middle", buffers | {"comb": buffers["comb"].mT.contiguous()})
    want = one.expect(buffers)["new_streams"]
    assert fault("new_streams", turned["new_streams"], want) is not None


RUNS = {
    "first": ("first", 3, Output()),
    "middle, two groups, parts": ("middle", 10, BOTH),
    "last": ("last", 3, Output()),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_kernel_run(name: str) -> None:
    place, rows, u = RUNS[name]
    assert faults(case(SMALL, place, "none", rows, u=u), "sm_90a") == []


@pytest.mark.parametrize("name", ["zeros", "huge"])
def test_unusual_streams(name: str) -> None:
    assert faults(case(TINY, "middle", "none", 1, name, SIZES[name]), "sm_90a") == []


def test_a_token_alone_and_beside_others() -> None:
    one = case(TINY, "middle", "none", 3)
    kernel = one.launches[0].kernel
    together = _buffers(one)
    rows = {arg.name for arg in kernel.leaves() if arg.shape[:1] == ("rows",)}
    alone = {n: t[1:2].clone() if n in rows else t for n, t in together.items()}
    interpret(kernel, "sm_90a", together)
    interpret(kernel, "sm_90a", alone)
    for name in ("new_streams", "x", "new_post", "new_comb"):
        assert torch.equal(together[name][1].view(torch.uint8), alone[name][0].view(torch.uint8))


ALTERATIONS = {
    "weights are not waited for": (r"cp\.async\.wait_group[^;]*;", 0, ""),
    "an operand is taken twice": (r"\{(%r\d+),%r\d+\}, (?=\{[^}]*\};)", 7, r"{\1,\1}, "),
    "a letter is not emptied": (r"\{[^}]*st\.relaxed\.gpu\.global\.b32[^}]*\}", -1, ""),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    pattern, which, instead = ALTERATIONS[name]

    def alter(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + found.expand(instead) + ptx[found.end() :]

    assert faults(case(TINY, "middle", "none", 1), "sm_90a", alter=alter)


def test_cases_have_the_models_sizes() -> None:
    for config in (FLASH, PRO):
        for one in cases(config, "model", (1,)):
            sizes = {argument.name: argument.shape for argument in one.launches[0].kernel.leaves()}
            rows = 4 if one.shape == "last" else 24
            assert sizes["fn"] == (rows, 4 * config.hidden_size)
            assert one.nbytes > rows * 16 * config.hidden_size


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_machine_code(config: object, place: str, arch: str) -> None:
    assert isinstance(config, type(FLASH))
    code = machine_code(mhc(Shape.of(config), place), arch)
    assert f".target {arch}" in code.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in code.ptx
    assert code.ptx.index("cp.async.c") < code.ptx.index("griddepcontrol.wait")
    assert code.spilled <= 8  # two counts of the loop over groups of tokens, outside of it
