"""Appending to caches, query heads: the contracts' references, their bounds, the machine code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind
from dsv4.formats.model.releases import FLASH, PRO
from dsv4.formats.numeric.codecs import e2m1_decode, e4m3_decode, e8m0_decode, unpack_nibbles
from dsv4.kernels.core.contract import Buffers, Case, Expected
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.kv_cache import q_rope_contract
from dsv4.kernels.ops.kv_cache.contract import Layer, Run, append, case, cases, checks
from dsv4.kernels.reference.compressor import compress
from dsv4.kernels.reference.indexer import hadamard
from dsv4.kernels.reference.norm import head_norm, rms_norm
from dsv4.kernels.reference.quant_sim import (
    INDEXER_BLOCK,
    KV_BLOCK,
    fake_quant_fp4,
    fake_quant_fp8,
)
from dsv4.kernels.reference.rope import apply_rope
from tests.support.machine_code import machine_code

RUNS = [Run(2, 5, 3), Run(0, 125, 9), Run(1, 4095), Run(3, 250, 6), Run(4, 0, 5)]
CSA, HCA = (Layer.of(FLASH, kind) for kind in (AttentionKind.CSA, AttentionKind.HCA))
NOPE = CSA.width - CSA.rope


def _buffers(one: Case) -> Buffers:
    return one.make(torch.Generator().manual_seed(5))


def _certain(expected: Expected) -> tuple[Tensor, Tensor]:
    """Bytes, and which of them can be no other."""
    return expected.value.to(torch.uint8), torch.as_tensor(expected.tolerance) == 0


def _kv_values(codes: Expected, scales: Expected) -> tuple[Tensor, Tensor]:
    """What rows `[n, 576]` of a cache stand for, `[n, 512]`, and where that is certain."""
    raw, sure = _certain(codes)
    exponents, known = _certain(scales)
    assert not exponents[:, -1].any()
    blocks = e8m0_decode(exponents[:, :-1]).repeat_interleave(KV_BLOCK, 1)
    known = known[:, :-1].repeat_interleave(KV_BLOCK, 1)
    tail = raw[:, NOPE:].contiguous().view(torch.bfloat16).to(torch.float32)
    values = torch.cat((e4m3_decode(raw[:, :NOPE]) * blocks, tail), 1)
    return values, torch.cat((sure[:, :NOPE] & known, sure[:, NOPE::2] & sure[:, NOPE + 1 :: 2]), 1)


def _key_values(codes: Expected, scales: Expected) -> tuple[Tensor, Tensor]:
    raw, sure = _certain(codes)
    exponents, known = _certain(scales)
    values = e2m1_decode(unpack_nibbles(raw))
    blocks = e8m0_decode(exponents).repeat_interleave(INDEXER_BLOCK, 1)
    return values * blocks, sure.repeat_interleave(2, 1) & known.repeat_interleave(INDEXER_BLOCK, 1)


def _same(found: tuple[Tensor, Tensor], reference: Tensor) -> None:
    values, sure = found
    assert values.shape == reference.shape
    assert sure.to(torch.float32).mean() > 0.97
    assert torch.equal(values[sure], reference.to(torch.float32)[sure])


def _at(expected: Expected, slot: Tensor, place: Tensor) -> Expected:
    tolerance = torch.as_tensor(expected.tolerance).expand_as(expected.value)
    return Expected(expected.value[slot, place], tolerance[slot, place])


def _kv_row(vector: Tensor, norm: Tensor, buffers: Buffers, position: Tensor) -> Tensor:
    """By the reference operations."""
    normed = rms_norm(vector, norm, FLASH.rms_norm_eps)
    turned = apply_rope(normed, buffers["cos"][position], buffers["sin"][position])
    return torch.cat((fake_quant_fp8(turned[:, :NOPE], KV_BLOCK), turned[:, NOPE:]), 1)


def test_vectors_and_window_rows_are_the_reference_operations() -> None:
    buffers = _buffers(one := case(CSA, "test", "none", RUNS, slots=5))
    expected = one.expect(buffers)
    latent = rms_norm(buffers["latent"], buffers["q_norm"], FLASH.rms_norm_eps)
    assert fault("qr", latent.to(torch.bfloat16), expected["qr"]) is None
    position, slot = buffers["position"].long(), buffers["slot"].long()
    place = slot, position % buffers["window_kv"].shape[1]
    rows, scales = (_at(expected[name], *place) for name in ("window_kv", "window_scales"))
    kv = rms_norm(buffers["kv"], buffers["kv_norm"], FLASH.rms_norm_eps).to(torch.bfloat16)
    turned = apply_rope(kv, buffers["cos"][position], buffers["sin"][position])
    whole = torch.cat((fake_quant_fp8(turned[:, :NOPE], KV_BLOCK), turned[:, NOPE:]), 1)
    _same(_kv_values(rows, scales), whole)


def _compressed(layer: Layer, prefix: str, run: Run, row: int, buffers: Buffers) -> Tensor:
    """Entries of a run by `compress`, whose ring is the newest part of the longer one."""
    span = layer.ratio * (2 if layer.overlap else 1)
    rings = []
    for name, absent in (("ring_kv", 0.0), ("ring_gate", float("-inf"))):
        longer = buffers[f"{prefix}_{name}"][run.slot]
        ring = torch.full((span, longer.shape[1]), absent)
        for token in range(max(run.first - span, 0), run.first):
            ring[token % span] = longer[token % len(longer)]
        rings.append(ring)
    kv, gate = (buffers[f"{prefix}_{name}"][row : row + run.count] for name in ("kv", "gate"))
    return compress(kv, gate, buffers[f"{prefix}_ape"], rings[0], rings[1], run.first)


@pytest.mark.parametrize(("layer", "prefix"), [(CSA, "c"), (CSA, "i"), (HCA, "c")])
def test_entries_are_the_reference_operations(layer: Layer, prefix: str) -> None:
    buffers = _buffers(one := case(layer, "test", "none", RUNS, slots=5))
    expected, row = one.expect(buffers), 0
    names = (f"{prefix}_entries", f"{prefix}_scales")
    for run in RUNS:
        entries = _compressed(layer, prefix, run, row, buffers).to(torch.bfloat16)
        row += run.count
        blocks = torch.arange(run.first // layer.ratio, (run.first + run.count) // layer.ratio)
        assert len(entries) == len(blocks)
        if not len(blocks):
            continue
        position, slot = blocks * layer.ratio, torch.full_like(blocks, run.slot)
        codes, scales = (_at(expected[name], slot, blocks) for name in names)
        if prefix == "c":
            rows = _kv_row(entries, buffers["c_norm"], buffers, position)
            _same(_kv_values(codes, scales), rows)
        else:
            normed = rms_norm(entries, buffers["i_norm"], FLASH.rms_norm_eps)
            turned = apply_rope(normed, buffers["cos"][position], buffers["sin"][position])
            _same(_key_values(codes, scales), fake_quant_fp4(hadamard(turned), INDEXER_BLOCK))


@pytest.mark.parametrize("layer", [CSA, HCA], ids=["CSA", "HCA"])
def test_rings_hold_the_step(layer: Layer) -> None:
    buffers = _buffers(one := case(layer, "test", "none", [*RUNS, Run(0, -1)], slots=5))
    expected = one.expect(buffers)
    for prefix in layer.widths():
        ring = expected[f"{prefix}_ring_gate"].value
        untouched = torch.ones(ring.shape[:2], dtype=torch.bool)
        for row, (at, slot) in enumerate(
            zip(buffers["position"].tolist(), buffers["slot"].tolist(), strict=True)
        ):
            if at >= 0:
                gate = buffers[f"{prefix}_gate"][row] + buffers[f"{prefix}_ape"][at % layer.ratio]
                assert torch.equal(ring[slot, at % ring.shape[1]], gate)
                untouched[slot, at % ring.shape[1]] = False
        assert torch.equal(ring[untouched], buffers[f"{prefix}_ring_gate"][untouched])


def test_query_heads_are_the_reference_operations() -> None:
    buffers = _buffers(one := q_rope_contract.case(FLASH, "test", "none", (0, 7, 70000)))
    heads = buffers["q"].view(3, FLASH.num_attention_heads, FLASH.head_dim)
    normed = head_norm(heads, FLASH.rms_norm_eps).to(torch.bfloat16)
    place = buffers["position"].long()
    turned = apply_rope(normed, buffers["cos"][place], buffers["sin"][place])
    assert fault("out", turned, one.expect(buffers)["out"]) is None


@pytest.mark.parametrize("name", ["window_kv", "window_scales", "c_entries", "i_entries"])
def test_another_byte_is_a_fault(name: str) -> None:
    buffers = _buffers(one := case(CSA, "test", "none", [Run(0, 126, 2)]))
    expected = one.expect(buffers)[name]
    found = expected.value.to(torch.uint8)
    assert fault(name, found, expected) is None
    changed = (expected.value != buffers[name]).nonzero()[0]  # of what the step writes
    found[tuple(changed)] += 1 + int(2 * torch.as_tensor(expected.tolerance).max())
    assert fault(name, found, expected) is not None


def test_cases_and_checks_cover_both_models() -> None:
    for config, name in ((FLASH, "flash"), (PRO, "pro")):
        shapes = {str(one) for one in (*cases(config, name, (1, 8)), *checks(config, name))}
        assert len(shapes) > 30
        assert any("csa entry" in shape for shape in shapes)
    assert "append sliding flash rows 1" in {str(one) for one in cases(FLASH, "flash", (1,))}


@pytest.mark.parametrize(
    ("kind", "arch"), [("CSA", "sm_90a"), ("HCA", "sm_90a"), ("CSA", "sm_100a")]
)
def test_machine_code(kind: str, arch: str) -> None:
    code = machine_code(append(CSA if kind == "CSA" else HCA), arch)
    assert f".target {arch}" in code.ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in code.ptx
    assert "cp.async.cg.shared.global" in code.ptx
    assert code.ptx.index("griddepcontrol.wait") < code.ptx.index("st.global")
    assert code.spilled == 0
    assert code.resources["REG"] <= 128  # 512 threads of a CTA where entries have 128 slots


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_machine_code_of_query_heads(arch: str) -> None:
    code = machine_code(q_rope_contract.q_rope(FLASH), arch)
    assert code.spilled == 0
    assert code.ptx.index("griddepcontrol.wait") < code.ptx.index("ld.volatile.global")
