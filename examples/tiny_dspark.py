"""One DSpark stage under autograd: what `dsv4.runtime.dspark` computes, for many anchors at once.

Weights are a dict by hub name without `mtp.0.`; routed experts are stacks `ffn.experts.w1`, `w2`
and `w3`. Matrix products run in BF16 if not told otherwise, all else in FP32. Which token a row
follows is told, so all rows of a block are computed together: row i of anchor p gets the embedding
of the token at p + 1 (i = 0) or of noise, and predicts the token at p + 2 + i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.reference.mhc import sinkhorn
from dsv4.kernels.reference.rope import apply_rope, inverse_frequencies, rope_table

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of all rows of all blocks, `[anchors, rows]` before the last dimension.

    logits: float32 `[..., vocab]`, with the Markov bias; confidence: float32 `[...]`, a logit.
    load: how many rows chose each expert.
    """

    logits: Tensor
    confidence: Tensor
    load: Tensor


class Stage:
    """A stage that is the first and the last. embed, head: float32 `[vocab, D]`, the backbone's;
    length: of the longest sequence.

    nearness: how much of a score each token's distance from the block takes away. Attention that is
    spread over the window learns little; a trainer begins with some and ends with 0, which is
    DSpark.
    """

    def __init__(
        self,
        config: ModelConfig,
        embed: Tensor,
        head: Tensor,
        length: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.embed, self.head, self.dtype = config, embed, head, dtype
        self.nearness = 0.0
        noise = torch.full((self.rows,), 4.0)
        noise[0] = 0.0
        self._distance = torch.cat([torch.arange(config.sliding_window, 0, -1) - 1.0, noise])
        frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, None)
        self.cos, self.sin = rope_table(frequencies, torch.arange(length + self.rows))

    @property
    def rows(self) -> int:
        """Of a block."""
        assert self.config.dspark_block_size is not None
        return self.config.dspark_block_size

    def __call__(self, w: Weights, taps: Tensor, ids: Tensor, anchors: Tensor) -> Rows:
        """taps: `[B, S, 3 D]`; ids: int64 `[B, S]`; anchors: int64 `[B, A]`, below S - 1 - rows."""
        batch, length = ids.shape
        keys = self._context(w, taps)
        first = (torch.arange(batch) * length)[:, None]
        back = anchors[..., None] + torch.arange(1 - self.config.sliding_window, 1)
        past = keys[(first[..., None] + back.clamp(min=0)).flatten(0, 1)]
        behind = anchors[..., None] + 1 + torch.arange(self.rows)
        tokens = ids.flatten()[(first[..., None] + behind).flatten(0, 1)]  # [N, rows]
        asked = torch.full_like(tokens, self.config.dspark_noise_token_id or 0)
        asked[:, 0] = tokens[:, 0]
        streams = self.embed[asked].flatten(0, 1)[:, None].expand(-1, self.config.hc_mult, -1)

        def attend(x: Tensor) -> Tensor:
            return self._attention(w, x, past, (back < 0).flatten(0, 1), behind.flatten())

        streams = self._sublayer(w, "attn", streams, attend)
        load = torch.zeros(self.config.n_routed_experts)
        streams = self._sublayer(w, "ffn", streams, lambda x: self._experts(w, x, load))
        y = self._collapse(w, streams).unflatten(0, tokens.shape)
        before = w["markov_head.markov_w1.weight"][tokens]
        logits = self.linear(self._norm(y, w["norm.weight"]), self.head)
        logits = logits + self.linear(before, w["markov_head.markov_w2.weight"])
        confidence = torch.cat([y, before], -1) @ w["confidence_head.proj.weight"][0]
        return Rows(logits, confidence, load)

    def _context(self, w: Weights, taps: Tensor) -> Tensor:
        """Keys of every token, `[B S, head_dim]`."""
        main = self._norm(self.linear(taps, w["main_proj.weight"]), w["main_norm.weight"])
        at = torch.arange(taps.shape[1]).repeat(taps.shape[0])
        return self._keys(w, main.flatten(0, 1), at)

    def _keys(self, w: Weights, x: Tensor, at: Tensor) -> Tensor:
        kv = self._norm(self.linear(x, w["attn.wkv.weight"]), w["attn.kv_norm.weight"])
        return apply_rope(kv, self.cos[at], self.sin[at])

    def _attention(self, w: Weights, x: Tensor, past: Tensor, hidden: Tensor, at: Tensor) -> Tensor:
        """x: `[N rows, D]`; past: `[N, window, d]`, of which `hidden` are not there."""
        c = self.config
        heads, width, rows = c.num_attention_heads, c.head_dim, self.rows
        cos, sin = self.cos[at], self.sin[at]
        latent = self._norm(self.linear(x, w["attn.wq_a.weight"]), w["attn.q_norm.weight"])
        q = self.linear(latent, w["attn.wq_b.weight"]).unflatten(-1, (heads, width))
        q = apply_rope(F.rms_norm(q, (width,), eps=c.rms_norm_eps), cos, sin)
        block = self._keys(w, x, at).unflatten(0, (-1, rows))
        keys = torch.cat([past, block], 1).to(self.dtype)
        q = q.unflatten(0, (-1, rows)).flatten(1, 2).to(self.dtype)  # [N, rows heads, d]
        scores = (q @ keys.transpose(1, 2)).float() * width**-0.5
        scores = scores - self.nearness * self._distance
        scores = scores.masked_fill(F.pad(hidden, (0, rows))[:, None], float("-inf"))
        sinks = w["attn.attn_sink"].repeat(rows)[None, :, None].expand(len(q), -1, 1)
        shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(self.dtype)
        o = (shares @ keys).float().unflatten(1, (rows, heads)).flatten(0, 1)
        o = apply_rope(o, cos, sin, inverse=True).unflatten(1, (c.o_groups, -1)).flatten(2)
        parts = w["attn.wo_a.weight"].chunk(c.o_groups)
        z = torch.cat([self.linear(o[:, group], part) for group, part in enumerate(parts)], -1)
        return self.linear(z, w["attn.wo_b.weight"])

    def _experts(self, w: Weights, x: Tensor, load: Tensor) -> Tensor:
        c = self.config
        affinity = F.softplus(F.linear(x, w["ffn.gate.weight"])).sqrt()
        chosen = (affinity.detach() + w["ffn.gate.bias"]).topk(c.num_experts_per_tok).indices
        shares = affinity.gather(1, chosen)
        shares = shares / shares.sum(1, keepdim=True) * c.routed_scaling_factor
        load += torch.bincount(chosen.flatten(), minlength=c.n_routed_experts)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=c.n_routed_experts).tolist()
        rows = order // c.num_experts_per_tok
        found = [
            self._swiglu(part, *(w[f"ffn.experts.w{n}"][expert] for n in (1, 2, 3)), share)
            for expert, (part, share) in enumerate(
                zip(x[rows].split(counts), shares.flatten()[order].split(counts), strict=True)
            )
        ]
        routed = torch.zeros_like(x).index_add(0, rows, torch.cat(found))
        shared = (w[f"ffn.shared_experts.w{n}.weight"] for n in (1, 2, 3))
        return routed + self._swiglu(x, *shared)

    def _swiglu(
        self, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, share: Tensor | None = None
    ) -> Tensor:
        limit = self.config.swiglu_limit
        gate, up = self.linear(x, w1).clamp(max=limit), self.linear(x, w3).clamp(-limit, limit)
        inner = F.silu(gate) * up
        return self.linear(inner if share is None else inner * share[:, None], w2)

    def _sublayer(
        self, w: Weights, name: str, streams: Tensor, through: Callable[[Tensor], Tensor]
    ) -> Tensor:
        c, m = self.config, self.config.hc_mult
        mix = self._mix(w[f"hc_{name}_fn"], streams)
        scale, base = w[f"hc_{name}_scale"], w[f"hc_{name}_base"]
        pre = (mix[:, :m] * scale[0] + base[:m]).sigmoid() + c.hc_eps
        post = 2 * (mix[:, m : 2 * m] * scale[1] + base[m : 2 * m]).sigmoid()
        square = (mix[:, 2 * m :] * scale[2] + base[2 * m :]).unflatten(-1, (m, m))
        comb = sinkhorn(square, c.hc_sinkhorn_iters, c.hc_eps)
        x = self._norm((pre[..., None] * streams).sum(1), w[f"{name}_norm.weight"])
        return post[..., None] * through(x)[:, None] + comb.transpose(1, 2) @ streams

    def _collapse(self, w: Weights, streams: Tensor) -> Tensor:
        mix = self._mix(w["hc_head_fn"], streams) * w["hc_head_scale"] + w["hc_head_base"]
        return ((mix.sigmoid() + self.config.hc_eps)[..., None] * streams).sum(1)

    def _mix(self, fn: Tensor, streams: Tensor) -> Tensor:
        flat = streams.flatten(1)
        return F.linear(F.rms_norm(flat, flat.shape[1:], eps=self.config.rms_norm_eps), fn)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """`x wᵀ`, float32."""
        return F.linear(x.to(self.dtype), w.to(self.dtype)).float()
