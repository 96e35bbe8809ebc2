"""The tiny model under transformers, made fast enough to train in minutes.

It is transformers' DeepseekV4ForCausalLM. Three of its parts are exchanged for equal ones that need
less memory and never wait for the GPU, so that a whole step can be captured as a CUDA graph:

* attention looks at the blocks that a window reaches instead of all pairs of tokens;
* experts are two dense products over all of them, the routing weight being 0 for most;
* the indexer's scorer does not copy its keys for every query.

RoPE tables stay in float32 under bfloat16 activations, as in DeepSeek's own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.releases import RELEASE_YARN
from dsv4.synthetic.tiny import hub_config

CONFIG = ModelConfig(
    vocab_size=1536,
    hidden_size=256,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=64,
    o_lora_rank=64,
    o_groups=2,
    moe_intermediate_size=128,
    n_routed_experts=24,
    num_experts_per_tok=4,
    num_hash_layers=2,
    compress_ratios=(0, 0, 4, 128, 4),
    index_n_heads=4,
    index_topk=64,
    yarn=RELEASE_YARN,
)
"""All kinds of attention, hash and score routing; from 257 tokens on the indexer chooses."""


def build(config: ModelConfig, frequencies: Tensor, seed: int) -> Any:
    """A fresh float32 model. frequencies: `[vocab]`, how often each token occurs."""
    torch.manual_seed(seed)
    fields = hub_config(config, DraftKind.NONE)
    for ours in ("quantization_config", "expert_dtype", "torch_dtype", "transformers_version"):
        del fields[ours]
    model = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            **fields, attn_implementation="windowed", experts_implementation="all_experts"
        )
    )
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("_hc.base"):  # streams mostly keep to themselves at first
                size = config.hc_mult
                parameter[2 * size :].copy_(2 * torch.eye(size).flatten())
            elif parameter.dim() >= 2 and not name.endswith(("position_bias", "_hc.fn", "hc_fn")):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5 * 0.6)
    order = frequencies.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    for layer in range(config.num_hash_layers):
        table = model.model.layers[layer].mlp.gate.tid2eid
        table.copy_(_hash_table(rank, config, layer))
    return model


def _hash_table(rank: Tensor, config: ModelConfig, layer: int) -> Tensor:
    """Distinct experts per token; frequent tokens are dealt out evenly, layers differ."""
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    stride = 1 + (rank // experts + layer) % 5
    return (rank[:, None] + torch.arange(top_k) * stride[:, None]) % experts


def to_bfloat16(model: Any) -> None:
    """What the released files hold in BF16 computes in it; the rest stays float32."""
    strict = model._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if not any(part in strict for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()


def windowed(
    module: nn.Module, q: Tensor, kv: Tensor, _: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention to the last `sliding_window` tokens and the compressed entries `mask` allows.

    q: `[B, H, S, d]`; kv: `[B, 1, S + T, d]`; mask: `[B, 1, S, T]`, added to the scores.
    Returns `[B, S, H, d]` and the probabilities of the entries, `[B, H, S, T]`.
    """
    batch, heads, length, width = q.shape
    window = kwargs["sliding_window"]
    step = min(window, length)
    blocks = -(-length // step)
    entries = kv[:, 0, length:]
    near = F.pad(kv[:, 0, :length], (0, 0, step, blocks * step - length)).view(
        batch, blocks + 1, step, width
    )
    near = torch.cat([near[:, :-1], near[:, 1:]], 2)[:, None]  # [B, 1, blocks, 2 step, d]
    tiles = F.pad(q, (0, 0, 0, blocks * step - length)).view(batch, heads, blocks, step, width)
    local = (tiles @ near.transpose(-1, -2)).float() * scaling
    local = local.masked_fill(_out_of_window(step, window, blocks, q.device), float("-inf"))
    local = local.flatten(2, 3)[:, :, :length]  # [B, H, S, 2 step]
    far = (q @ entries[:, None].transpose(-1, -2)).float() * scaling
    if entries.shape[1]:
        far = far + mask
    sinks = module.sinks.float().view(1, heads, 1, 1).expand(batch, heads, length, 1)
    probabilities = torch.cat([local, far, sinks], -1).softmax(-1).to(q.dtype)
    at_near, at_far, _ = probabilities.split([2 * step, entries.shape[1], 1], -1)
    at_tiles = F.pad(at_near, (0, 0, 0, blocks * step - length)).view(
        batch, heads, blocks, step, 2 * step
    )
    out = (at_tiles @ near).flatten(2, 3)[:, :, :length] + at_far @ entries[:, None]
    return out.transpose(1, 2), at_far


def _out_of_window(step: int, window: int, blocks: int, device: torch.device) -> Tensor:
    """`[blocks, step, 2 step]`: pairs further apart than the window, in the future, or padding."""
    query = torch.arange(step, device=device)[None, :, None] + step
    key = torch.arange(2 * step, device=device)[None, None, :]
    first = torch.arange(blocks, device=device)[:, None, None] == 0
    return (key > query) | (key <= query - window) | (first & (key < step))


def all_experts(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert for every token, weighted before `down_proj` as DeepSeek does it."""
    experts, width = module.num_experts, module.intermediate_dim
    dense = torch.zeros(x.shape[0], experts, dtype=weights.dtype, device=x.device)
    dense = dense.scatter(1, chosen, weights)
    module.load = (dense.detach() > 0).sum(0)
    gate_up = F.linear(x, module.gate_up_proj.flatten(0, 1)).view(-1, experts, 2 * width)
    act = module._apply_gate(gate_up) * dense[..., None].to(x.dtype)
    return act.flatten(1) @ module.down_proj.transpose(1, 2).flatten(0, 1)


def _index_scores(self: Any, q: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    hits = F.relu(torch.einsum("bshd,btd->bsht", q, keys).float()) * self.softmax_scale
    weights = self.weights_proj(hidden).float() * self.weights_scaling
    return (hits * weights.unsqueeze(-1)).sum(dim=2)


_their_rotary = theirs.DeepseekV4RotaryEmbedding.forward


def _rotary(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    return _their_rotary(self, x[:0].float(), position_ids, layer_type=layer_type)


ALL_ATTENTION_FUNCTIONS.register("windowed", windowed)
ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
theirs.DeepseekV4IndexerScorer.forward = _index_scores
theirs.DeepseekV4RotaryEmbedding.forward = _rotary


@dataclasses.dataclass
class Watch:
    """What a forward pass leaves behind for the indexers' loss."""

    scores: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    attention: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def indexer_loss(self, ratio: int) -> Tensor:
        """How far the indexers' choice is from where the attention looks: KL, mean over layers.

        The target is the attention to compressed entries, summed over heads. No gradient leaves
        the indexer, and none of the model's own loss enters it: a choice has no derivative.
        """
        losses = []
        for layer, scores in self.scores.items():
            length, entries = scores.shape[1:]
            at = torch.arange(length, device=scores.device)
            hidden = torch.arange(entries, device=scores.device) >= (at[:, None] + 1) // ratio
            seen = (at + 1) // ratio > 0
            target = self.attention[layer].detach().float().sum(1)
            target = target / (target.sum(-1, keepdim=True) + 1e-9)
            log = scores.masked_fill(hidden, -1e4).log_softmax(-1)
            kl = target * ((target + 1e-9).log() - log)
            losses.append((kl.sum(-1) * seen).mean())
        return torch.stack(losses).mean()


def watch(model: Any) -> Watch:
    """Hook the CSA layers of `model`; each forward pass then fills the watch."""
    found = Watch()
    for number, layer in _csa_layers(model):
        attention = layer.self_attn

        def keep_scores(_m: Any, _a: Any, scores: Tensor, number: int = number) -> None:
            found.scores[number] = scores

        def keep_attention(_m: Any, _a: Any, out: Any, number: int = number) -> None:
            found.attention[number] = out[1]

        def cut(_m: Any, args: Any) -> Any:
            return (args[0].detach(), args[1].detach(), *args[2:])

        attention.compressor.indexer.scorer.register_forward_hook(keep_scores)
        attention.compressor.indexer.register_forward_pre_hook(cut)
        attention.register_forward_hook(keep_attention)
    return found


def choose_blocks(model: Any, count: int) -> None:
    """How many compressed entries a query may attend to in the CSA layers."""
    for _, layer in _csa_layers(model):
        layer.self_attn.compressor.indexer.index_topk = count


def _csa_layers(model: Any) -> Iterator[tuple[int, Any]]:
    for number, layer in enumerate(model.model.layers):
        if layer.self_attn.layer_type == "compressed_sparse_attention":
            yield number, layer


def score_routers(model: Any) -> list[tuple[Any, Any]]:
    """(router, experts) of every layer that chooses by score."""
    return [
        (layer.mlp.gate, layer.mlp.experts) for layer in model.model.layers if not layer.mlp.is_hash
    ]


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """int64 `[B, S]` -> float32 `[B, S, vocab]`, without a cache."""
    batch, length = ids.shape
    # Only the compressed part of a mask is looked at; this one has no room for any other.
    empty = torch.zeros(batch, 1, length, 0, device=ids.device)
    hidden = model.model(ids, attention_mask={"mask": empty}, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden).float()
    return logits
