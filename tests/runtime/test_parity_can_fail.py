"""The parity tests would notice: every tensor matters, and every known mistake shows.

The mistakes are those that other DeepSeek-V4 runtimes shipped, or nearly did.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.reference import compressor as compressor_ops
from dsv4.kernels.reference import mhc, moe, norm, rope, router
from dsv4.runtime.model import load
from dsv4.runtime.positions import Step
from tests.runtime.agreement import FLOAT32_TOLERANCE, deviation
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import ODD_SHAPED, random_ids, random_weights

# Few enough blocks chosen that the indexer matters; long enough for one HCA block.
CONFIG = dataclasses.replace(ODD_SHAPED, index_topk=8)
IDS = random_ids(CONFIG, 150)
CLEARLY_WRONG = 10 * FLOAT32_TOLERANCE


@functools.cache
def weights() -> dict[str, Tensor]:
    return random_weights(CONFIG)


def logits(tensors: dict[str, Tensor]) -> Tensor:
    return load(InMemoryWeights(CONFIG, tensors)).session(len(IDS)).forward(IDS)


@functools.cache
def right() -> Tensor:
    return logits(weights())


def kind_of(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def one_of_each_kind() -> list[str]:
    """The last layer's (a CSA layer's) tensor of a kind where there is one."""
    return sorted({kind_of(name): name for name in random_weights(CONFIG)}.values())


def disturbed(tensor: Tensor) -> Tensor:
    """Another tensor of the same kind: rows rotated, or values shifted unevenly."""
    if tensor.dim() > 1:
        return tensor.roll(1, 0)
    return tensor + torch.linspace(0.1, 0.5, tensor.shape[0])


@pytest.mark.parametrize("name", one_of_each_kind(), ids=kind_of)
def test_every_tensor_matters(name: str) -> None:
    changed = weights() | {name: disturbed(weights()[name])}
    assert deviation(logits(changed), right()) > CLEARLY_WRONG


def keep_inverse(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    return x if inverse else rope.apply_rope(x, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """The other RoPE convention: pairs (i, i + R/2)."""
    dim = 2 * cos.shape[-1]
    to_pairs = torch.arange(dim).view(2, -1).T.flatten()
    turned = x.clone()
    turned[..., -dim:] = x[..., -dim:][..., to_pairs]
    turned = rope.apply_rope(turned, cos, sin, inverse=inverse)
    turned[..., -dim:] = turned[..., -dim:][..., to_pairs.argsort()]
    return turned


def biased_weights(
    logits: Tensor, bias: Tensor, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    affinity = torch.nn.functional.softplus(logits).sqrt() + bias
    best = affinity.topk(top_k)
    return best.indices, best.values / best.values.sum(-1, keepdim=True) * scaling


def unnormalised(affinity: Tensor, topk_idx: Tensor, scaling: float) -> Tensor:
    return affinity.gather(-1, topk_idx) * scaling


def swapped_halves(tokens: Tensor, blocks: int, ratio: int) -> Tensor:
    half = tokens.shape[1] // 2
    swapped = torch.cat((tokens[:, half:], tokens[:, :half]), 1)
    return compressor_overlapping(swapped, blocks, ratio)


compressor_overlapping = compressor_ops._overlapping
swiglu, sinkhorn, split_gate_up = moe.swiglu, mhc.sinkhorn, moe.split_gate_up

MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "no norm of query heads": ("dsv4.runtime.attention.head_norm", lambda q, eps, numerics: q),
    "output left rotated": ("dsv4.runtime.attention.apply_rope", keep_inverse),
    "halves rotated instead of pairs": ("dsv4.runtime.attention.apply_rope", rotate_halves),
    "entries not rotated": ("dsv4.runtime.compressor.apply_rope", lambda x, cos, sin: x),
    "index queries not rotated": ("dsv4.runtime.indexer.apply_rope", lambda x, cos, sin: x),
    "no YaRN": (
        "dsv4.runtime.positions.inverse_frequencies",
        lambda dim, theta, yarn: rope.inverse_frequencies(dim, theta, None),
    ),
    "one theta for all layers": (
        "dsv4.runtime.positions.inverse_frequencies",
        lambda dim, theta, yarn: rope.inverse_frequencies(dim, 10000.0, yarn),
    ),
    "window one short": (
        "dsv4.runtime.session.Step",
        lambda ids, position, window, tables: Step(ids, position, window - 1, tables),
    ),
    "blocks seen one token late": (
        "dsv4.runtime.positions.Step.visible_blocks",
        lambda self, ratio: self.positions // ratio,
    ),
    "blocks seen early": (
        "dsv4.runtime.positions.Step.visible_blocks",
        lambda self, ratio: (self.positions + 2) // ratio,
    ),
    "overlap halves swapped": (
        "dsv4.kernels.reference.compressor._overlapping",
        swapped_halves,
    ),
    "streams mixed in the wrong direction": (
        "dsv4.runtime.layer.mhc_post",
        lambda u, x, post, comb: mhc.mhc_post(u, x, post, comb.mT),
    ),
    "one Sinkhorn round": (
        "dsv4.kernels.reference.mhc.sinkhorn",
        lambda mix, iterations, eps: sinkhorn(mix, 1, eps),
    ),
    "no SwiGLU clamp": (
        "dsv4.kernels.reference.moe.swiglu",
        lambda gate, up, limit: swiglu(gate, up, 0.0),
    ),
    "gate clamped from below": (
        "dsv4.kernels.reference.moe.swiglu",
        lambda gate, up, limit: swiglu(gate.clamp(-limit, limit), up, limit),
    ),
    "gate and up swapped": (
        "dsv4.kernels.reference.moe.split_gate_up",
        lambda x, interleave: split_gate_up(x, interleave)[::-1],
    ),
    "rows not interleaved": (
        "dsv4.kernels.reference.moe.split_gate_up",
        lambda x, interleave: split_gate_up(x, 0),
    ),
    "bias in the routing weights": ("dsv4.runtime.moe.route_by_score", biased_weights),
    "routing weights not normalised": (
        "dsv4.kernels.reference.router._weights",
        unnormalised,
    ),
    "no norm before the output head": (
        "dsv4.runtime.layer.hc_head",
        lambda x, fn, base, scale, hc_eps, norm_eps: x.mean(1),
    ),
    "norm without weight": (
        "dsv4.runtime.compressor.rms_norm",
        lambda x, weight, eps: norm.rms_norm(x, torch.ones_like(weight), eps),
    ),
}


@pytest.mark.parametrize(("target", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_known_mistakes_show(
    target: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = right()
    monkeypatch.setattr(target, wrong)
    assert deviation(logits(weights()), expected) > CLEARLY_WRONG


def test_the_router_is_not_patched_by_accident() -> None:
    """A mistake that misses its target would be reported as unnoticed, not as noticed."""
    assert deviation(logits(weights()), right()) == 0.0
    assert router.route_by_score is not biased_weights
