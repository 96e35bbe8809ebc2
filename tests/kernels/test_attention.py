"""Sparse attention: the contract's reference, what the check catches, machine code, and runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH, PRO
from dsv4.kernels.core.contract import Buffers, Case
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.attention.contract import DECODE_ROWS, attention, case, cases, checks
from dsv4.kernels.ops.attention.inputs import Plan
from dsv4.kernels.ops.attention.reference import Shape, expected, seen_rows, shapes_of
from tests.support.interpreter.alterations import instead, without
from tests.support.interpreter.run import faults
from tests.support.machine_code import machine_code

# The kernels' dimensions, on few rows.
SMALL = {
    "sliding": Shape("none", 64, 512, 64, 128),
    "CSA": Shape("list", 64, 512, 64, 128, 4, 64),
    "HCA": Shape("all", 64, 512, 64, 128, 128),
}


def _case(kind: str, plan: Plan, **tuning: int | bool) -> Case:
    return case(FLASH, SMALL[kind], kind, "small", plan, tuning)


def _made(kind: str, plan: Plan) -> tuple[Shape, Buffers]:
    return SMALL[kind], _case(kind, plan).make(torch.Generator().manual_seed(5))


def _plain(shape: Shape, buffers: Buffers, token: int) -> Tensor:
    """One token's output by torch's own formats, softmax and complex numbers."""
    place, slot = (int(buffers[name][token]) for name in ("position", "slot"))

    def rows(name: str, at: list[int]) -> Tensor:
        kv, scales = (buffers[f"{name}_{part}"][slot, at] for part in ("kv", "scales"))
        codes = kv[:, :448].view(torch.float8_e4m3fn).to(torch.float64).reshape(-1, 7, 64)
        factors = scales[:, :7].contiguous().view(torch.float8_e8m0fnu).to(torch.float64)
        near = kv[:, 448:].contiguous().view(torch.bfloat16).to(torch.float64)
        return torch.cat(((codes * factors[..., None]).flatten(1), near), 1)

    ring = buffers["window_kv"].shape[1]
    kv = rows("window", [p % ring for p in range(max(0, place - 127), place + 1)])
    if shape.mode == "list":
        kv = torch.cat((kv, rows("compressed", [b for b in buffers["blocks"][token] if b >= 0])))
    elif shape.mode == "all":
        kv = torch.cat((kv, rows("compressed", list(range((place + 1) // shape.ratio)))))
    scores = buffers["q"][token].to(torch.float64) @ kv.T / 512**0.5
    sinks = buffers["sinks"].to(torch.float64)[:, None]
    o = torch.cat((scores, sinks), 1).softmax(1)[:, :-1] @ kv
    angle = torch.complex(*(buffers[n][place].to(torch.float64) for n in ("cos", "sin")))
    pairs = torch.view_as_complex(o[:, 448:].reshape(-1, 32, 2))
    o[:, 448:] = torch.view_as_real(pairs * angle.conj()).flatten(1)
    return o


PLANS = {
    "one": Plan((700,), (0,)),
    "sequences": Plan((3, 700, 701, 20000), (0, 1, 1, 2)),
    "scattered": Plan((9000, 5), (1, 0), listed="scattered"),
    "extreme": Plan((6001, 77), (1, 0), extreme=True, sinks="far"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", SMALL)
def test_reference_is_plain_attention(kind: str, plan: str) -> None:
    shape, buffers = _made(kind, PLANS[plan])
    found = expected(shape, buffers)
    plain = torch.stack([_plain(shape, buffers, token) for token in range(len(found.value))])
    torch.testing.assert_close(found.value, plain, rtol=1e-9, atol=1e-12)
    assert fault("o", plain.to(torch.bfloat16), found) is None


@pytest.mark.parametrize("kind", SMALL)
def test_the_bound_catches_a_row_too_few_and_one_too_many(kind: str) -> None:
    shape, buffers = _made(kind, PLANS["one"])
    found = expected(shape, buffers)
    late = expected(shape, buffers | {"position": buffers["position"] - 1}).value
    assert fault("o", late.to(torch.bfloat16), found) is not None
    wider = expected(shape._replace(window=shape.window - 1), buffers).value
    assert fault("o", wider.to(torch.bfloat16), found) is not None


def test_a_row_is_listed_or_unseen() -> None:
    shape, buffers = _made("CSA", PLANS["scattered"])
    near, entries = seen_rows(shape, buffers, 0)
    assert len(near) == 128 and len(entries) == shape.topk // 3
    blocks = buffers["blocks"]
    assert (blocks[1] >= 0).sum() == 1 and (blocks[0, blocks[0] >= 0].diff() > 0).all()


def test_cases_are_the_layers_of_both_models() -> None:
    for config, heads, topk in ((FLASH, 64, 512), (PRO, 128, 1024)):
        shapes = shapes_of(config)
        assert {shape.heads for shape in shapes.values()} == {heads}
        assert shapes["CSA"].topk == topk == config.index_topk
        found = {one.shape: one for one in cases(config, "test", (8,))}
        for name, rows in (("sliding 8k", 128), ("CSA 8k", 128 + topk), ("HCA 128k", 128 + 1024)):
            if name.split()[0] in shapes:
                moved = 8 * (2 * heads * 512 * 2 + rows * 584)
                assert moved - 8 * 2 * 584 <= found[name].nbytes <= moved
    names = {one.shape for one in checks(FLASH, "test")}
    assert {"CSA listed scattered", "HCA extreme scales", "sliding first token"} <= names


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("rows", [1, 8, DECODE_ROWS + 1])
def test_kernels_multiply_in_warpgroups_without_spilling(rows: int, arch: str) -> None:
    first, *others = (machine_code(one, arch) for one in attention(shapes_of(PRO)["CSA"], rows))
    assert ("wgmma.mma_async" in first.ptx) == (arch == "sm_90a")
    assert ("mma.sync.aligned.m16n8k16" in first.ptx) == (arch == "sm_100a")
    assert "cp.async.cg.shared.global" in first.ptx
    assert len(others) == (rows <= DECODE_ROWS)
    assert not any(one.spilled for one in (first, *others))


RUNS = {
    "scattered": ("CSA", Plan((700, 3), (1, 0), listed="scattered"), {"most_splits": 1}),
    "extreme": ("CSA", Plan((700,), (0,), extreme=True), {"most_splits": 1, "cuts": 2}),
    "far": ("HCA", Plan((9000,), (0,), sinks="far"), {"most_splits": 2, "stages": 1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_interpreted(name: str) -> None:
    kind, plan, tuning = RUNS[name]
    assert faults(_case(kind, plan, **({"cuts": 1} | tuning)), "sm_90a") == []


@pytest.mark.parametrize("name", ["scattered", "extreme"])
def test_interpreted_where_warps_multiply_on_their_own(name: str) -> None:
    kind, plan, tuning = RUNS[name]
    assert faults(_case(kind, plan, **({"cuts": 1} | tuning)), "sm_100a") == []


def _block(first: int, count: int) -> Case:
    """Rows of a draft: from the end of a block of 5 on, all see the same."""
    turns = tuple(range(first, first + count))
    plan = Plan((first + 4,) * count, (1,) * count, turns=turns)
    shape = SMALL["sliding"]._replace(window=128 + 5)
    return case(FLASH, shape, "block", "small", plan, {"cuts": 1})


@pytest.mark.parametrize(
    ("first", "count"), [(127, 1), pytest.param(700, 5, marks=pytest.mark.long)]
)
def test_a_block_of_a_draft_interpreted(first: int, count: int) -> None:
    one = _block(first, count)
    assert [launch.kernel.operation for launch in one.launches] == ["attention", "attention_join"]
    assert faults(one, "sm_90a") == []


def test_the_bound_catches_angles_of_other_positions() -> None:
    one = _block(127, 5)
    buffers = one.make(torch.Generator().manual_seed(5))
    shape, found = SMALL["sliding"]._replace(window=133), one.expect(buffers)["o"]
    table = {name: buffers[name].nan_to_num(1.0) for name in ("cos", "sin")}
    for turn in (buffers["position"], buffers["turn"] - 1):
        wrong = expected(shape, buffers | table | {"turn": turn}).value
        assert fault("o", wrong.to(torch.bfloat16), found) is not None


def test_one_part_has_no_angles_of_its_own() -> None:
    with pytest.raises(ValueError, match="one part"):
        attention(SMALL["sliding"]._replace(window=59), 5, turned=True)


ALTERATIONS = {
    "rows are not waited for": ("sm_90a", without(r"\{ \.reg \.pred p; WAIT_\d+:.*?\}", 0)),
    "one product is missing": ("sm_90a", without(r"wgmma\.mma_async[^;]*;", 7)),
    "sums are not waited for": ("sm_90a", without(r"wgmma\.wait_group[^;]*;", 1)),
    "probabilities are not awaited": ("sm_90a", without(r"bar\.sync[^;]*;", 4)),
    "one of a warp's products is missing": ("sm_100a", without(r"mma\.sync[^;]*;", 9)),
    "values are not turned": ("sm_100a", instead(r"x4\.trans\.shared", "x4.shared")),
    "a warp's probabilities are not awaited": ("sm_100a", without(r"bar\.sync[^;]*;", 4)),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    arch, alteration = ALTERATIONS[name]
    one = _case("sliding", Plan((190,), (0,)), most_splits=1, cuts=1)
    for seed in range(4):
        try:
            if faults(one, arch, seed, alteration):
                return
        except (AssertionError, RuntimeError):
            return
    raise AssertionError("not caught")
