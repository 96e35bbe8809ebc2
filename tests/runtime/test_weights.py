"""Loading refuses weights that do not fit their config, naming the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.model import load
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import REAL_SHAPED, random_weights

DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "short norm": ("layers.1.attn_norm.weight", lambda t: t[:-1], "found shape (255,)"),
    "integer norm": ("norm.weight", lambda t: t.to(torch.int32), "expected a floating-point"),
    "transposed matrix": ("layers.0.attn.wq_a.weight", lambda t: t.T, "found shape (256, 64)"),
    "matrix of doubles": ("head.weight", lambda t: t.double(), "found torch.float64 of rank 2"),
    "flat matrix": ("layers.2.attn.wkv.weight", lambda t: t.flatten(), "of rank 1"),
    "missing streams": ("layers.3.hc_ffn_fn", lambda t: t[:, :256], "found shape (24, 256)"),
    "narrow compressor": (
        "layers.2.attn.compressor.ape",
        lambda t: t[:, :128],
        "found shape (4, 128), expected (4, 256)",
    ),
    "expert out of range": (
        "layers.1.ffn.gate.tid2eid",
        lambda t: t + 1,
        "experts 1 to 8 are listed, expected 0 to 7",
    ),
    "negative expert": ("layers.0.ffn.gate.tid2eid", lambda t: t - 1, "experts -1 to 6"),
    "fractional expert": ("layers.0.ffn.gate.tid2eid", lambda t: t.float(), "expected integers"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_refuses_by_name(name: str, damage: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = random_weights(REAL_SHAPED)
    weights = InMemoryWeights(REAL_SHAPED, tensors | {name: damage(tensors[name])})
    with pytest.raises(RuntimeRefusal, match=re.escape(f"{name}: ") + ".*" + re.escape(message)):
        load(weights)


def test_refuses_experts_of_another_shape() -> None:
    weights = InMemoryWeights(REAL_SHAPED, random_weights(REAL_SHAPED))
    stack = weights.experts("layers.4.ffn.experts")
    stack.w2s.pop()
    with pytest.raises(RuntimeRefusal, match=r"layers\.4\.ffn\.experts: found 7 experts"):
        load(weights)
    stack.w2s.append(torch.zeros(1))
    stack.w13s[0] = torch.zeros(256, 255)
    with pytest.raises(RuntimeRefusal, match=r"layers\.4\.ffn\.experts\.w13: found shape"):
        load(weights)


def test_refuses_other_dtypes() -> None:
    weights = InMemoryWeights(REAL_SHAPED, random_weights(REAL_SHAPED))
    with pytest.raises(RuntimeRefusal, match=r"expected torch\.float32 or torch\.bfloat16"):
        load(weights, dtype=torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refuses_a_missing_gpu() -> None:
    weights = InMemoryWeights(REAL_SHAPED, random_weights(REAL_SHAPED))
    with pytest.raises(RuntimeRefusal, match="torch sees no CUDA device"):
        load(weights, device="cuda")


def test_bfloat16_storage_of_float32_tensors_is_accepted() -> None:
    """Some exports downcast hc_*, sinks, ape and biases; they are read as float32 all the same."""
    tensors = random_weights(REAL_SHAPED)
    stored = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    restored = {n: t.float() if t.is_floating_point() else t for n, t in stored.items()}
    ids = torch.arange(20)
    found = load(InMemoryWeights(REAL_SHAPED, stored)).session(20).forward(ids)
    expected = load(InMemoryWeights(REAL_SHAPED, restored)).session(20).forward(ids)
    assert torch.equal(found, expected)
