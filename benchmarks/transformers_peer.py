"""transformers' DeepseekV4 beside ours: the same layers in bfloat16, the same tokens, one GPU.

It is imported only when it is asked for. Its weights are ours, dequantised; the parameters that it
keeps in float32 stay so. Both read the same prompt, theirs in pieces, and then the same tokens one
by one, whose logits are compared. A step is timed as its user has it, launched from Python, with
each implementation of experts that it offers, and once as a CUDA graph of a step at a fixed place,
which it does not offer itself.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.decode import Report, measure
from dsv4.bench.kernels import graph_seconds
from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, Kind, parameters
from dsv4.formats.numeric.layouts import deinterleave_rows, dequantize
from dsv4.kernels.core.library import Library
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.session import GpuSession

PIECE = 1024  # tokens of a prompt at once
TOKENS = 8  # compared, one by one
STEPS = 12  # timed
DIFFERENCE = 0.2  # of the logits' deviation: two models in bfloat16, one with caches in FP8 and FP4
EXPERTS = ("eager", "batched_mm", "grouped_mm")

KINDS = {0: "sliding_attention", 128: "heavily_compressed_attention"}
SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "swiglu_limit",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
)
# Applied in order; hub name -> transformers name.
RENAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)$", r".\1_hc.\2"),
    (r"\.attn\.", ".self_attn."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.indexer\.compressor\.", ".indexer."),
    (r"\.(compressor|indexer)\.ape$", r".\1.position_bias"),
    (r"\.(compressor|indexer)\.wkv\.", r".\1.kv_proj."),
    (r"\.(compressor|indexer)\.wgate\.", r".\1.gate_proj."),
    (r"\.(compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.indexer\.wq_b\.", ".indexer.q_b_proj."),
    (r"\.weights_proj\.", ".scorer.weights_proj."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.ffn\.", ".mlp."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
)


@dataclasses.dataclass(frozen=True)
class Rival:
    """A way to run its step. seconds: of a step of one token, None when it failed; fault: how."""

    name: str
    seconds: float | None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Rivals:
    """difference: root mean square between its logits and ours, in their deviation; same: share of
    tokens with the same likeliest next one. fault: why there are no figures.
    """

    version: str
    context: int
    difference: float
    same: float
    lines: tuple[Rival, ...]
    fault: str = ""

    @property
    def right(self) -> bool:
        """Whether the logits agree as far as both formats can."""
        return self.difference <= DIFFERENCE


def beside_ours(
    config: ModelConfig, model: str, library: Library, device: torch.device, *, context: int
) -> tuple[Report, Rivals]:
    """Our step of one token, checked and timed, and theirs on the same weights."""
    weights = RandomWeights(config, device)
    session = GpuModel(weights, library, device).session(context + MAX_ROWS, chunk=0)
    report = measure(session, weights, model, context, (1,))
    return report, rivals(session, weights, context)


def rivals(session: GpuSession, weights: RandomWeights, context: int) -> Rivals:
    """Both models over the same prompt of `context` tokens, then their steps."""
    try:
        return _rivals(session, weights, context)
    except ImportError as error:
        return Rivals("", context, 0.0, 0.0, (), f"not installed: {error.name}")
    except torch.OutOfMemoryError:
        return Rivals("", context, 0.0, 0.0, (), "does not fit beside ours; try fewer --layers")


def _rivals(session: GpuSession, weights: RandomWeights, context: int) -> Rivals:
    transformers = importlib.import_module("transformers")
    config, device = session.model.config, session.model.device
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (context + TOKENS,), generator=rng).to(device)
    session.reset()
    session.forward(ids[:context].cpu(), "last")
    ours = torch.cat([session.forward(ids[n : n + 1]) for n in range(context, context + TOKENS)])
    session.reset()
    model = build(weights)
    cache, _ = read(model, ids[:context])
    filled = copy.deepcopy(cache)
    theirs = torch.cat(
        [read(model, ids[n : n + 1], cache)[1] for n in range(context, context + TOKENS)]
    )
    lines = tuple(timed(model, filled, ids[context : context + 1]))
    return Rivals(transformers.__version__, context, *agreement(ours, theirs), lines)


def agreement(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """(difference, same) of logits `[T, V]`, see `Rivals`."""
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).square().mean().sqrt() / theirs.std()
    return float(difference), float((ours.argmax(1) == theirs.argmax(1)).double().mean())


def timed(model: Any, cache: Any, token: Tensor) -> Iterator[Rival]:
    """A step of `token` after `cache`, in every way."""
    for name in EXPERTS:
        yield _try(name, functools.partial(_launched, model, name, cache, token))
    graphed = functools.partial(_graphed, model, cache, token)
    yield _try("batched_mm, as a CUDA graph", graphed)


def _try(name: str, measure: Callable[[], float]) -> Rival:
    try:
        return Rival(name, measure())
    except Exception as error:  # it is somebody else's code
        said = str(error).splitlines()[0].partition(". ")[0]
        return Rival(name, None, f"{type(error).__name__}: {said}")


def _launched(model: Any, experts: str, cache: Any, token: Tensor) -> float:
    """Median seconds of a step that is launched from Python, the cache growing as it does."""
    model.set_experts_implementation(experts)
    growing, times = copy.deepcopy(cache), []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        read(model, token, growing)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _graphed(model: Any, cache: Any, token: Tensor) -> float:
    """Median seconds of the step's kernels alone, at one place: copies of the cache start it."""
    model.set_experts_implementation("batched_mm")
    kept = []  # a graph knows only addresses

    def run() -> Tensor:
        start = copy.copy(cache)
        start.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in start.layers:
            for name, value in vars(layer).items():
                if isinstance(value, dict):
                    setattr(layer, name, dict(value))
        kept.append(start)
        return read(model, token, start)[1]

    return graph_seconds([run])


def read(model: Any, ids: Tensor, cache: Any = None) -> tuple[Any, Tensor]:
    """Append `ids`, a piece at a time: the cache, and the last token's logits float32 `[1, V]`."""
    logits = torch.empty(0)
    for piece in torch.split(ids, PIECE):
        with torch.inference_mode():
            found = model(piece[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = found.past_key_values, found.logits[0].float()
    return cache, logits


def build(weights: RandomWeights) -> Any:
    """Its model in bfloat16 on the weights' device, with their values."""
    transformers = importlib.import_module("transformers")
    config, before = weights.config, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(weights.device):
            model = transformers.DeepseekV4ForCausalLM(its_config(config)).eval()
    finally:
        torch.set_default_dtype(before)
    wide = _kept_wide(model, config)
    state: dict[str, Tensor] = {}
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if parameter.is_floating_point() and wide & set(name.split(".")):
            parameter.data = parameter.data.float()
        state[name] = parameter.data
    for name, value in _plain_values(weights):
        state[its_name(name)].copy_(value)
    for layer in range(config.num_hidden_layers):
        _copy_experts(weights, layer, state)
    return model


def _kept_wide(model: Any, config: ModelConfig) -> set[str]:
    """Modules that it keeps in float32; not norms in versions that would then leave bfloat16."""
    found = set(model._keep_in_fp32_modules_strict)
    norm = copy.deepcopy(model.model.norm).float()
    x = torch.ones(1, config.hidden_size, dtype=torch.bfloat16, device=norm.weight.device)
    return found if norm(x).dtype == x.dtype else {n for n in found if not n.endswith("norm")}


def _plain_values(weights: RandomWeights) -> Iterator[tuple[str, Tensor]]:
    """All but the routed experts, by the hub's names."""
    for one in parameters(weights.config, DraftKind.NONE, 0):
        if one.kind is Kind.EXPERT:
            continue
        matrix = one.kind in (Kind.LINEAR, Kind.PLAIN) and len(one.shape) == 2
        if matrix and one.name != "embed.weight":
            yield one.name, dequantize(weights.matrix(one.name))
        else:
            yield one.name, weights.tensor(one.name)


def _copy_experts(weights: RandomWeights, layer: int, state: Mapping[str, Tensor]) -> None:
    found = weights.experts(f"layers.{layer}.ffn.experts")
    target = f"model.layers.{layer}.mlp.experts"
    for expert in range(len(found)):
        w13 = dequantize(found.w13(expert))
        state[f"{target}.gate_up_proj"][expert] = torch.cat(
            deinterleave_rows(w13, found.interleave)
        ).to(torch.bfloat16)
        state[f"{target}.down_proj"][expert] = dequantize(found.w2(expert)).to(torch.bfloat16)


def its_name(name: str) -> str:
    """transformers' name of the hub's tensor `name`."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def its_config(c: ModelConfig, experts: str = "grouped_mm") -> Any:
    """transformers' config of the same model. experts: how it runs them."""
    factor = c.qk_rope_head_dim / c.head_dim
    rope = {"partial_rotary_factor": factor}
    compress: dict[str, Any] = {**rope, "rope_theta": c.compress_rope_theta, "rope_type": "default"}
    if c.yarn is not None:
        compress |= {
            "rope_type": "yarn",
            "factor": c.yarn.factor,
            "beta_fast": c.yarn.beta_fast,
            "beta_slow": c.yarn.beta_slow,
            "original_max_position_embeddings": c.yarn.original_max_position_embeddings,
            "attention_factor": 1.0,
        }
    layers = range(c.num_hidden_layers)
    return importlib.import_module("transformers").DeepseekV4Config(
        **{name: getattr(c, name) for name in SAME_NAME},
        partial_rotary_factor=factor,
        rope_parameters={
            "main": {**rope, "rope_theta": c.rope_theta, "rope_type": "default"},
            "compress": compress,
        },
        layer_types=[KINDS.get(r, "compressed_sparse_attention") for r in c.compress_ratios],
        mlp_layer_types=["hash_moe" if c.is_hash_layer(n) else "moe" for n in layers],
        attn_implementation="eager",
        experts_implementation=experts,
    )
