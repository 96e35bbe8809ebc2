"""The reference operations one by one: golden values, torch's own attention, ml_dtypes.

Golden values without another source come from DeepSeek's inference code and transformers, run
once on the inputs named.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from dsv4.formats.numeric.operands import Fp8Matrix, Nvfp4Matrix
from dsv4.kernels.reference import accumulate
from dsv4.kernels.reference.accumulate import spans
from dsv4.kernels.reference.attention import sparse_attention
from dsv4.kernels.reference.compressor import compress
from dsv4.kernels.reference.indexer import hadamard, index_scores, top_blocks
from dsv4.kernels.reference.linear import dequantize_rows, grouped_linear, linear
from dsv4.kernels.reference.mhc import hc_head, mhc_post, mhc_pre
from dsv4.kernels.reference.moe import split_gate_up
from dsv4.kernels.reference.numerics import Numerics
from dsv4.kernels.reference.quant_sim import fake_quant_fp4, fake_quant_fp8
from dsv4.kernels.reference.rope import apply_rope, inverse_frequencies, rope_table
from dsv4.kernels.reference.router import route_by_hash, route_by_score
from tests.runtime.in_memory import Packing, fp8, nvfp4, plain
from tests.runtime.official_oracle import round_fp4, round_fp8, sylvester
from tests.runtime.small_models import YARN


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- hyper-connections ---------------------------------------------------------------------------

PRE = (0.5249802, 0.7100251, 0.7042643, 0.5105296)
POST = (0.7816882, 0.7782004, 0.9781582, 1.1992407)
COMB = (
    (0.5681823, 0.3223456, 0.0810292, 0.0284406),
    (0.0096896, 0.1283918, 0.6283670, 0.2335515),
    (0.0929922, 0.0503002, 0.1421103, 0.7145978),
    (0.3291348, 0.4989614, 0.1484926, 0.0234091),
)


def test_mhc_golden() -> None:
    """Mixes sin(i), bases 0.1·cos(i), scales 1, 1/2, 2; streams of +-1 have a mean square of 1."""
    width, m = 8, 4
    flat = randn(m * width).sign()
    streams = flat.view(1, m, width)
    i = torch.arange(24)
    fn = torch.sin(i)[:, None] * flat * math.sqrt(1 + 1e-6) / flat.numel()
    y, post, comb = mhc_pre(
        streams,
        fn,
        0.1 * torch.cos(i),
        torch.tensor([1.0, 0.5, 2.0]),
        sinkhorn_iters=20,
        hc_eps=1e-6,
        norm_eps=1e-6,
    )
    assert_close(y[0], (torch.tensor(PRE)[:, None] * streams[0]).sum(0), rtol=0, atol=1e-6)
    assert_close(post[0], torch.tensor(POST), rtol=0, atol=1e-6)
    assert_close(comb[0], torch.tensor(COMB), rtol=0, atol=1e-6)


def test_mhc_post_sends_rows_to_columns() -> None:
    """One stream is copied to another: row = source, column = destination."""
    streams = randn(1, 4, 6)
    comb = torch.zeros(1, 4, 4)
    comb[0, 1, 2] = 1.0
    moved = mhc_post(torch.zeros(1, 6), streams, torch.ones(1, 4), comb)
    assert torch.equal(moved[0, 2], streams[0, 1])
    assert not moved[0, (0, 1, 3), :].any()


def test_hc_head_weighs_by_sigmoid() -> None:
    """Without a projection every stream weighs sigmoid(base) + eps."""
    streams = randn(3, 4, 6)
    y = hc_head(
        streams, torch.zeros(4, 24), torch.full((4,), 2.0), torch.ones(1), hc_eps=0.25, norm_eps=0.0
    )
    assert_close(y, streams.sum(1) * (torch.tensor(2.0).sigmoid() + 0.25))


# --- RoPE ----------------------------------------------------------------------------------------


def test_yarn_golden() -> None:
    found = inverse_frequencies(64, 160000.0, YARN)
    golden = {
        0: 1.0,
        1: 0.687656045,
        15: 3.635538509e-3,
        16: 2.265624935e-3,
        20: 2.969777852e-4,
        24: 1.953125320e-5,
        25: 5.372312444e-6,
        31: 5.680529398e-7,
    }
    for pair, expected in golden.items():
        assert found[pair].item() == pytest.approx(expected, rel=1e-6)


def test_plain_frequencies_golden() -> None:
    found = inverse_frequencies(64, 10000.0, None)
    for pair, expected in {1: 0.7498942018, 15: 1.333521493e-2, 31: 1.333521504e-4}.items():
        assert found[pair].item() == pytest.approx(expected, rel=1e-6)


def test_rope_is_a_complex_product() -> None:
    frequencies = inverse_frequencies(16, 10000.0, None)
    positions = torch.tensor([0, 1, 77, 100_000])
    cos, sin = rope_table(frequencies, positions)
    x = randn(4, 3, 40)
    turned = apply_rope(x, cos, sin)
    angles = (positions.float()[:, None] * frequencies).double()
    pairs = torch.view_as_complex(x[..., 24:].double().unflatten(-1, (8, 2)))  # type: ignore[no-untyped-call]
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None])
    assert torch.equal(turned[..., :24], x[..., :24])
    assert_close(turned[..., 24:], expected.flatten(-2).float())
    assert_close(apply_rope(turned, cos, sin, inverse=True), x)


# --- fake quantisation ---------------------------------------------------------------------------


def test_fp8_golden() -> None:
    """A block whose largest value is 448: scale 1. BF16 turns 449 into it."""
    x = torch.zeros(64, dtype=torch.bfloat16)
    x[:5] = torch.tensor([449, -3.296875, 0.0130005, 5.5e-5, -100])
    found = fake_quant_fp8(x, 64)
    assert found.dtype == torch.bfloat16
    assert found[:5].tolist() == [448, -3.25, 0.013671875, 0, -96]


def test_fp4_golden() -> None:
    """Scale 1; ties go to the even code, unlike in some ports of the official code."""
    x = torch.tensor([6.0, 0.25, 1.25, 2.5, 5.0, 0.26, 4.9, 5.1, 0.75, 1.75, 3.5, -0.75, -3.5])
    found = fake_quant_fp4(x, 32)
    assert found.tolist() == [6, 0, 1, 2, 4, 0.5, 4, 6, 1, 2, 4, -1, -4]


@pytest.mark.parametrize("columns", [128, 448, 200, 16])
@pytest.mark.parametrize("block", [128, 64, 32])
def test_fake_quantisation_against_ml_dtypes(columns: int, block: int) -> None:
    x = randn(50, columns) * torch.exp2(8 * randn(50, 1, seed=1))
    x[0] = 0.0
    x[1] = torch.exp2(torch.arange(columns) % 40 - 20)  # every amax a power of two
    assert torch.equal(fake_quant_fp8(x, block), round_fp8(x, block))
    assert torch.equal(fake_quant_fp4(x, block), round_fp4(x, block))


def test_not_a_number_survives() -> None:
    x = torch.full((32,), float("nan"))
    assert fake_quant_fp8(x, 32).isnan().all()
    assert fake_quant_fp4(x, 32).isnan().all()


# --- indexer -------------------------------------------------------------------------------------


def test_hadamard_golden() -> None:
    e5 = torch.zeros(128)
    e5[5] = 1.0
    found = hadamard(e5)
    signs = "".join("+" if value > 0 else "-" for value in found[:16])
    assert signs == "+-+--+-++-+--+-+"
    assert_close(found.abs(), torch.full((128,), 0.0883883), rtol=0, atol=1e-7)


@pytest.mark.parametrize("d", [1, 16, 128])
def test_hadamard_is_sylvesters(d: int) -> None:
    x = randn(7, 3, d)
    assert_close(hadamard(x), x @ sylvester(d))
    assert_close(hadamard(hadamard(x)), x)


def test_index_scores_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    q, w, keys = randn(9, 4, 16), randn(9, 4, seed=1), randn(30, 16, seed=2)
    expected = torch.einsum("th,thn->tn", w, torch.einsum("thd,nd->thn", q, keys).relu())
    assert_close(index_scores(q, w, keys), expected)
    whole = index_scores(q, w, keys)
    monkeypatch.setattr(accumulate, "TEMPORARY_ELEMENTS", 250)
    assert torch.equal(index_scores(q, w, keys), whole)


def test_top_blocks_prefers_the_earlier_of_equals_and_pads() -> None:
    scores = torch.tensor([[0.0, 5.0, 0.0, 0.0, 9.0], [1.0, 5.0, 1.0, 7.0, 9.0]])
    assert top_blocks(scores, torch.tensor([4, 1]), 3).tolist() == [[1, 0, 2], [0, -1, -1]]


# --- routing -------------------------------------------------------------------------------------


def test_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[1.0, 1.0, 3.0, -2.0]])
    idx, weights = route_by_score(logits, torch.tensor([0.0, 0.0, -9.0, 9.0]), 3, 2.0)
    assert idx.tolist() == [[3, 0, 1]]
    affinity = torch.tensor([-2.0, 1.0, 1.0]).exp().log1p().sqrt()
    assert_close(weights[0], 2.0 * affinity / affinity.sum())


def test_hash_routing_follows_the_table() -> None:
    table = torch.tensor([[0, 1], [3, 2], [1, 3]])
    idx, weights = route_by_hash(randn(2, 4), torch.tensor([2, 1]), table, 1.5)
    assert idx.tolist() == [[1, 3], [3, 2]]
    assert_close(weights.sum(-1), torch.full((2,), 1.5))


def test_vanished_affinities_stay_finite() -> None:
    _, weights = route_by_score(torch.full((1, 4), -1e4), torch.zeros(4), 2, 1.5)
    assert weights.isfinite().all()


# --- attention -----------------------------------------------------------------------------------


def test_attention_against_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's attention over all rows, masked to those listed; a sink is a key of value 0."""
    tokens, heads, d, rows, entries = 6, 3, 16, 11, 7
    q, kv, compressed = randn(tokens, heads, d), randn(rows, d, seed=1), randn(entries, d, seed=2)
    sinks = randn(heads, seed=3)
    rng = torch.Generator().manual_seed(4)
    listed = torch.rand((tokens, rows + entries), generator=rng) < 0.5
    listed[:, 0] = True
    listed[2, rows:] = False

    mask = torch.full((heads, tokens, rows + entries + 1), float("-inf"))
    mask[:, listed.nonzero()[:, 0], listed.nonzero()[:, 1]] = 0.0
    mask[:, :, -1] = sinks[:, None]
    keys = torch.cat((kv, compressed, torch.zeros(1, d))).expand(heads, -1, -1)
    expected = scaled_dot_product_attention(q.transpose(0, 1), keys, keys, mask, scale=0.3)

    def rows_of(part: Tensor) -> Tensor:
        return torch.where(part, torch.arange(part.shape[1]), -1)

    def found() -> Tensor:
        window_idx, compressed_idx = rows_of(listed[:, :rows]), rows_of(listed[:, rows:])
        return sparse_attention(q, kv, window_idx, compressed, compressed_idx, sinks, 0.3)

    assert_close(found(), expected.transpose(0, 1))
    whole = found()
    monkeypatch.setattr(accumulate, "TEMPORARY_ELEMENTS", 2 * (rows + entries) * d)
    assert torch.equal(found(), whole)


def test_attention_without_entries_reads_none() -> None:
    q, kv, sinks = randn(1, 2, 8), randn(4, 8), torch.zeros(2)
    window_idx = torch.tensor([[-1, 2, 3]])
    garbage = torch.full((5, 8), float("nan"))
    nothing = torch.zeros((1, 0), dtype=torch.int64)
    assert torch.equal(
        sparse_attention(q, kv, window_idx, garbage, nothing, sinks, 1.0),
        sparse_attention(q, kv, window_idx, None, None, sinks, 1.0),
    )


# --- compressor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [1, 2])
def test_compressor_by_definition(halves: int) -> None:
    """Block by block, slot by slot, from the whole sequence."""
    ratio, d, tokens = 4, 3, 19
    width = halves * d
    kv, gate, ape = randn(tokens, width), randn(tokens, width, seed=1), randn(ratio, width, seed=2)
    ring_kv = torch.zeros(halves * ratio, width)
    ring_gate = torch.full((halves * ratio, width), float("-inf"))
    found, position = [], 0
    for count in (1, 2, 6, 1, 9):
        part = slice(position, position + count)
        found.append(compress(kv[part], gate[part], ape, ring_kv, ring_gate, position))
        position += count
    expected = []
    for block in range(tokens // ratio):
        slots = []
        if halves == 2 and block:
            slots += [(t, slice(0, d)) for t in range((block - 1) * ratio, block * ratio)]
        own = slice(width - d, width)
        slots += [(t, own) for t in range(block * ratio, (block + 1) * ratio)]
        gates = torch.stack([gate[t, half] + ape[t % ratio, half] for t, half in slots])
        values = torch.stack([kv[t, half] for t, half in slots])
        expected.append((gates.softmax(0) * values).sum(0))
    assert [len(part) for part in found] == [0, 0, 2, 0, 2]
    assert_close(torch.cat(found), torch.stack(expected))


# --- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [plain, nvfp4, fp8])
@pytest.mark.parametrize(("rows", "cols"), [(300, 256), (130, 100), (16, 40)])
def test_linear_with_packed_weights(
    packing: Packing, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, (held,) = packing((randn(rows, cols),), 0)
    x = randn(5, cols, seed=1)
    expected = (x.double() @ held.double().T).float()
    assert torch.equal(linear(x, matrix), expected)
    assert torch.equal(dequantize_rows(matrix, 3, 13), held[3:13])
    monkeypatch.setattr(accumulate, "TEMPORARY_ELEMENTS", 140 * cols)
    assert torch.equal(linear(x, matrix), expected)
    out = torch.empty(5, rows)
    assert linear(x, matrix, out=out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("interleave", [1, 8, 64])
def test_linear_with_interleaved_weights(interleave: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of very different magnitude, so that their global scales cannot be confused."""
    matrix, held = nvfp4((randn(192, 64), 1000 * randn(192, 64, seed=1)), interleave)
    x = randn(5, 64, seed=2)
    for limit in (1 << 23, 130 * 64):
        monkeypatch.setattr(accumulate, "TEMPORARY_ELEMENTS", limit)
        gate_up = split_gate_up(linear(x, matrix), interleave)
        for found, part in zip(gate_up, held, strict=True):
            assert torch.equal(found, (x.double() @ part.double().T).float())


def test_official_numerics_round_inputs_of_packed_weights_only() -> None:
    x, w = randn(5, 200), randn(64, 200, seed=1)
    rounded = round_fp8(x, 128).double()
    for packing in (nvfp4, fp8):
        matrix, (held,) = packing((w,), 0)
        assert isinstance(matrix, Nvfp4Matrix | Fp8Matrix)
        found = linear(x, matrix, numerics=Numerics.OFFICIAL)
        assert torch.equal(found, (rounded @ held.double().T).float())
    assert torch.equal(linear(x, w, numerics=Numerics.OFFICIAL), linear(x, w))


@pytest.mark.parametrize("packing", [plain, nvfp4, fp8])
def test_grouped_linear_is_block_diagonal(packing: Packing) -> None:
    groups, rank, cols = 3, 50, 64
    matrix, (held,) = packing((randn(groups * rank, cols),), 0)
    x = randn(4, groups, cols, seed=1)
    block_diagonal = torch.block_diag(*torch.split(held.double(), rank))  # type: ignore[no-untyped-call]
    expected = x.double().flatten(1) @ block_diagonal.T
    assert_close(grouped_linear(x, matrix), expected.float(), rtol=1e-6, atol=1e-6)


def test_spans_cover_once() -> None:
    for count, each, multiple in (
        (10, 1, 1),
        (1000, 1 << 22, 1),
        (1000, 1 << 16, 128),
        (5, 9, 128),
    ):
        runs = list(spans(count, each, multiple))
        assert [i for first, last in runs for i in range(first, last)] == list(range(count))
        assert all((last - first) % multiple == 0 for first, last in runs[:-1])
