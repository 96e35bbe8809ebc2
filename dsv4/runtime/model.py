"""DeepSeek-V4, top to bottom.

    token ids
      embed              [T, D]         copied into `hc_mult` residual streams [T, m, D]
      layers             each: attention, then mixture of experts, both inside hyper-connections
      collapse, norm     [T, D]
      head               [T, vocab]     float32 logits

A `Model` is immutable: weights, still packed, and the arithmetic to follow. Everything a sequence
changes lives in its `Session`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.mhc import hc_head, mhc_post, mhc_pre
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.attention import Attention
from dsv4.runtime.cache import LayerCache
from dsv4.runtime.moe import MixtureOfExperts
from dsv4.runtime.positions import Step
from dsv4.runtime.session import Session
from dsv4.runtime.weights import WeightReader, Weights

DEVICES = ("cpu", "cuda")


class HyperConnection:
    """Collapses the streams into a sublayer's normed input and spreads its output over them."""

    def __init__(self, read: WeightReader, prefix: str, norm: str) -> None:
        c = read.weights.config
        self.config = c
        self.fn = read.parameter(f"{prefix}_fn", c.hc_mix, c.hc_mult * c.hidden_size)
        self.base = read.parameter(f"{prefix}_base", c.hc_mix)
        self.scale = read.parameter(f"{prefix}_scale", 3)
        self.norm = read.parameter(norm, c.hidden_size)

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, m, D]` -> the sublayer's input `[T, D]`, and `post`, `comb` for `spread`."""
        c = self.config
        y, post, comb = mhc_pre(
            streams,
            self.fn,
            self.base,
            self.scale,
            sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )
        return rms_norm(y, self.norm, c.rms_norm_eps), post, comb

    def spread(self, u: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output `[T, D]` and the old streams -> the new streams."""
        return mhc_post(u, streams, post, comb)


class Layer:
    """Attention, then experts."""

    def __init__(self, read: WeightReader, layer: int, numerics: Numerics) -> None:
        prefix = f"layers.{layer}"
        self.attn_hc = HyperConnection(read, f"{prefix}.hc_attn", f"{prefix}.attn_norm.weight")
        self.attn = Attention(read, layer, numerics)
        self.ffn_hc = HyperConnection(read, f"{prefix}.hc_ffn", f"{prefix}.ffn_norm.weight")
        self.ffn = MixtureOfExperts(read, layer, numerics)

    def __call__(self, streams: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """streams: `[T, m, D]` -> the same shape. The tokens are appended to `cache`."""
        x, post, comb = self.attn_hc.collapse(streams)
        streams = self.attn_hc.spread(self.attn(x, step, cache), streams, post, comb)

        x, post, comb = self.ffn_hc.collapse(streams)
        return self.ffn_hc.spread(self.ffn(x, step.ids), streams, post, comb)


class Head:
    """The last layer's streams -> logits."""

    def __init__(self, read: WeightReader) -> None:
        c = read.weights.config
        self.config = c
        self.fn = read.parameter("hc_head_fn", c.hc_mult, c.hc_mult * c.hidden_size)
        self.base = read.parameter("hc_head_base", c.hc_mult)
        self.scale = read.parameter("hc_head_scale", 1)
        self.norm = read.parameter("norm.weight", c.hidden_size)
        self.weight = read.matrix("head.weight", c.vocab_size, c.hidden_size)

    def __call__(self, streams: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[T, m, D]` -> float32 `[T, vocab]`."""
        c = self.config
        y = hc_head(
            streams, self.fn, self.base, self.scale, hc_eps=c.hc_eps, norm_eps=c.rms_norm_eps
        )
        x = rms_norm(y, self.norm, c.rms_norm_eps)
        return linear(x, self.weight, dtype=torch.float32, out=out)


class Model:
    """The loaded model. Use `load` to make one and `session` to run it."""

    def __init__(self, read: WeightReader, dtype: torch.dtype, numerics: Numerics) -> None:
        c = read.weights.config
        self.config: ModelConfig = c
        self.device = read.device
        self.dtype = dtype
        self.numerics = numerics
        self.embed = read.table("embed.weight", c.vocab_size, c.hidden_size)
        self.layers = tuple(Layer(read, n, numerics) for n in range(c.num_hidden_layers))
        self.head = Head(read)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<Model of {c.num_hidden_layers} layers, {c.n_routed_experts} experts a layer, on "
            f"{self.device}, {self.dtype}, numerics {self.numerics}>"
        )

    def load_lines(self) -> Iterator[str]:
        """Nothing: weights stay in their mapped files and are read as they are used."""
        yield from ()

    def write_routes(self, path: Path | None = None) -> None:
        """Nothing: experts are not counted here."""

    def session(self, max_seq_len: int | None = None) -> Session:
        """An empty sequence with room for `max_seq_len` tokens."""
        return Session(self, max_seq_len)

    def forward(self, step: Step, caches: tuple[LayerCache, ...]) -> Tensor:
        """Run one step through all layers: the last layer's streams `[T, m, D]`."""
        embedded = self.embed[step.ids].to(self.dtype)
        streams = embedded[:, None].expand(-1, self.config.hc_mult, -1)
        for layer, cache in zip(self.layers, caches, strict=True):
            streams = layer(streams, step, cache)
        return streams


def load(
    weights: Weights,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    numerics: Numerics = Numerics.EXACT,
) -> Model:
    """Check `weights` against their config and make them a `Model`.

    dtype: float32 or bfloat16, of activations and caches; what DeepSeek-V4 computes in FP32 stays
    FP32 in both. Raises RuntimeRefusal naming the tensor that does not fit, or the device.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeRefusal(f"dtype is {dtype}, expected torch.float32 or torch.bfloat16")
    target = device_named(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise no_gpu()
    return Model(WeightReader(weights, target), dtype, numerics_named(numerics))


def device_named(name: str | torch.device) -> torch.device:
    """A device that models run on. Raises RuntimeRefusal for a name that is not one."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in DEVICES:
        raise RuntimeRefusal(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    return device


def numerics_named(name: str) -> Numerics:
    """One of `Numerics` by its name. Raises RuntimeRefusal for a name that is not one."""
    if name not in list(Numerics):
        raise RuntimeRefusal(f"numerics is {name!r}, expected one of {', '.join(Numerics)}")
    return Numerics(name)


def no_gpu() -> RuntimeRefusal:
    """What is said where a GPU was asked for and torch has none."""
    why = "" if torch.version.cuda else f": this torch ({torch.__version__}) is built without CUDA"
    return RuntimeRefusal(
        f"device 'cuda' was asked for, but torch sees no CUDA device here{why}; "
        "device 'cpu' runs on the CPU"
    )
