"""What sparse attention computes: the rows a token sees, and its output with an error bound.

See `operations.attention` for the contract. Caches hold rows of 576 bytes: 448 E4M3 codes, then
64 bfloat16 for the rotary dimensions; and 8 bytes of E8M0 scales, one per 64 codes, the last 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.codecs import e4m3_decode, e8m0_decode
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.reference.accumulate import WIDE
from dsv4.kernels.reference.attention import sparse_attention
from dsv4.kernels.reference.quant_sim import KV_BLOCK

CODES = 448  # dimensions in E4M3; the rotary ones that follow are bfloat16
ROW_BYTES = 576
SCALE_BYTES = 8
ROUNDOFF = 2.0**-8  # of bfloat16


class Shape(NamedTuple):
    """One kind of layer. mode: "none", "all" or "list"; topk: blocks listed for a token."""

    mode: str
    heads: int
    head_dim: int
    rotary: int
    window: int
    ratio: int = 0
    topk: int = 0


def shapes_of(config: ModelConfig) -> dict[str, Shape]:
    """The kinds of attention that a model has."""
    c = config
    common = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window
    found = {}
    for ratio in sorted(set(c.compress_ratios)):
        if ratio == 0:
            found["sliding"] = Shape("none", *common)
        elif ratio == c.csa_ratio:
            found["CSA"] = Shape("list", *common, ratio, c.index_topk)
        else:
            found["HCA"] = Shape("all", *common, ratio)
    return found


def dequantize(kv: Tensor, scales: Tensor) -> Tensor:
    """Rows as they lie in a cache -> float64 `[n, 512]`. kv: `[n, 576]`; scales: `[n, 8]`."""
    codes = e4m3_decode(kv[:, :CODES]).to(WIDE)
    factors = e8m0_decode(scales[:, : CODES // KV_BLOCK]).to(WIDE)
    rotary = kv[:, CODES:].contiguous().view(torch.bfloat16).to(WIDE)
    return torch.cat((codes * factors.repeat_interleave(KV_BLOCK, 1), rotary), 1)


def seen_rows(shape: Shape, buffers: Buffers, token: int) -> tuple[Tensor, Tensor]:
    """What one token attends to: window `[w, 512]` and entries `[k, 512]`, float64."""
    place, slot = int(buffers["position"][token]), int(buffers["slot"][token])
    window = buffers["window_kv"]
    device, ring = window.device, window.shape[1]
    places = torch.arange(max(0, place - shape.window + 1), place + 1, device=device) % ring
    near = dequantize(window[slot, places], buffers["window_scales"][slot, places])
    if shape.mode == "none":
        return near, near[:0]
    if shape.mode == "all":
        blocks = torch.arange((place + 1) // shape.ratio, device=device)
    else:
        listed = buffers["blocks"][token]
        blocks = listed[listed >= 0].to(torch.int64)
    kv, scales = buffers["compressed_kv"][slot], buffers["compressed_scales"][slot]
    return near, dequantize(kv[blocks], scales[blocks])


def expected(shape: Shape, buffers: Buffers) -> Expected:
    """The output before its last rounding, and how far bfloat16 results may be from it.

    With w the softmax weights and m = Σ w |v|:
    - probabilities are rounded to bfloat16: 2^-8 m;
    - a score is a sum of 512 exact products in a chain of 32 products of 16, each of which may lose
      2 units of the last place of A = Σ |q k| / sqrt(512); scaling, subtracting the maximum and
      exp2 (2^-22) add a few units of its size and of the sink's, unless that is so low that it has
      no weight. A weight is off by e = 2^-22 (32 A + 4) of itself, o by 2 e m;
    - a chain of n / 16 products and the join of 32 parts at most: 2^-22 (n / 8 + 32) m.
    A rotated pair mixes both errors by |cos| and |sin|. The result is rounded to bfloat16.
    """
    q, sinks = buffers["q"].to(WIDE), buffers["sinks"]
    scale = shape.head_dim**-0.5
    values, bounds = [], []
    for token in range(q.shape[0]):
        near, entries = seen_rows(shape, buffers, token)
        indices = [torch.arange(len(kv), device=kv.device)[None] for kv in (near, entries)]
        own = q[token : token + 1]
        values.append(sparse_attention(own, near, indices[0], entries, indices[1], sinks, scale))
        rows = torch.cat((near, entries))
        scores = own[0] @ rows.T * scale
        sink = sinks.to(WIDE)[:, None]
        weights = torch.cat((scores, sink), 1).softmax(1)[:, :-1]
        size = (own[0].abs() @ rows.abs().T * scale).amax(1, keepdim=True) + 1
        size = torch.maximum(size, torch.maximum(sink, -size).abs())
        share = ROUNDOFF + 2.0**-21 * (32 * size + 4)
        share = share + 2.0**-22 * (len(rows) / 8 + 32)
        bounds.append((weights @ rows.abs() * share)[None])
    places = buffers["turn" if "turn" in buffers else "position"].to(torch.int64)
    cos, sin = (buffers[name][places].to(WIDE)[:, None] for name in ("cos", "sin"))
    value = _turned_back(torch.cat(values), cos, sin, -1)
    # 2^-20 for the rotation's own error.
    wide = cos.abs() + 2.0**-20, sin.abs() + 2.0**-20
    bound = _turned_back(torch.cat(bounds), wide[0], wide[1], 1)
    return Expected(value, bound * (1 + ROUNDOFF) + value.abs() * ROUNDOFF)


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The last dimensions in pairs: even, odd -> even cos + odd sin, odd cos + sign even sin."""
    rotary = 2 * cos.shape[-1]
    even, odd = torch.unflatten(x[..., -rotary:], -1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos + odd * sin, odd * cos + sign * even * sin), -1)
    return torch.cat((x[..., :-rotary], turned.flatten(-2)), -1)
