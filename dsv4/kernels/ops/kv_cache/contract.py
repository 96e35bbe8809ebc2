"""Append a step's tokens to a layer's caches: what follows the projections of its input.

In one launch: `qr = rms(wq_a x; q_norm)`; the key/value row of each token in the window cache; the
tokens in the compressors' rings, and the entries (and indexer keys) of the blocks they complete.
References: `dsv4.kernels.reference.{norm,rope,compressor,indexer,quant_sim}`, with the official
rounding of caches. Formulas: DeepSeek-V4's `inference/model.py` and `kernel.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from dsv4.formats.model.config import AttentionKind, ModelConfig, YarnConfig
from dsv4.kernels.core.contract import Buffers, Case, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.kv_cache.reference import expect
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table

IMPLEMENTATION = "dsv4.kernels.ops.kv_cache.kernel:Append"
KV_SCALES = 8


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer. ratio: 0 without a compressor; index_width: 0 but for CSA.

    theta, yarn: of the rotation's angles.
    """

    latent: int
    width: int
    rope: int
    window: int
    ratio: int
    index_width: int
    eps: float
    theta: float
    yarn: YarnConfig | None

    @classmethod
    def of(cls, config: ModelConfig, kind: AttentionKind) -> Layer:
        """The layers of `kind` in a model."""
        csa, sliding = kind is AttentionKind.CSA, kind is AttentionKind.SLIDING
        ratio = 0 if sliding else config.csa_ratio if csa else max(config.compress_ratios)
        return cls(
            config.q_lora_rank,
            config.head_dim,
            config.qk_rope_head_dim,
            config.sliding_window,
            ratio,
            config.index_head_dim if csa else 0,
            config.rms_norm_eps,
            config.rope_theta if sliding else config.compress_rope_theta,
            None if sliding else config.yarn,
        )

    @property
    def overlap(self) -> bool:
        """Whether a block's slots include the block before (CSA)."""
        return self.index_width > 0

    @property
    def row_bytes(self) -> int:
        """Of a key/value row: E4M3 codes, then the rotated channels in bfloat16."""
        return self.width + self.rope

    def widths(self) -> dict[str, int]:
        """Prefix of the compressors' arguments -> channels of an entry."""
        parts = {"c": self.width} if self.ratio else {}
        return parts | ({"i": self.index_width} if self.overlap else {})


def append(layer: Layer, inputs: str = "float32", pdl: bool = True) -> Kernel:
    """The kernel for one kind of layer. inputs: dtype of the projections that are normed.

    Arguments: position, slot int32 `[T]`; cos, sin float32 `[P, rope / 2]`; and in one tuple
    latent `[T, L]`, q_norm, qr; kv `[T, W]`, kv_norm, window_kv, window_scales; for the compressor
    (prefix `c`) and the indexer's (`i`): kv, gate, ape, norm, ring_kv, ring_gate, entries, scales.
    A row of position -1 is not there: it leaves the caches alone.
    """
    config: dict[str, int | float | str | bool] = {
        "latent": layer.latent,
        "width": layer.width,
        "rope": layer.rope,
        "ratio": layer.ratio,
        "overlap": layer.overlap,
        "index_width": layer.index_width,
        "inputs": inputs,
        "eps": layer.eps,
        "pdl": pdl,
    }
    float32, byte, given = torch.float32, torch.uint8, getattr(torch, inputs)
    operands = [
        Argument("latent", given, ("rows", layer.latent)),
        Argument("q_norm", float32, (layer.latent,)),
        Argument("qr", torch.bfloat16, ("rows", layer.latent), "out"),
        Argument("kv", given, ("rows", layer.width)),
        Argument("kv_norm", float32, (layer.width,)),
        Argument("window_kv", byte, ("slots", "window", layer.row_bytes), "inout"),
        Argument("window_scales", byte, ("slots", "window", KV_SCALES), "inout", align=8),
    ]
    for prefix, width in layer.widths().items():
        operands += _compressor_arguments(layer, prefix, width)
    table = ("positions", layer.rope // 2)
    return kernel(
        "append",
        IMPLEMENTATION,
        config,
        (
            Argument("position", torch.int32, ("rows",), align=4),
            Argument("slot", torch.int32, ("rows",), align=4),
            Argument("cos", float32, table),
            Argument("sin", float32, table),
            tuple(operands),
        ),
    )


def _compressor_arguments(layer: Layer, prefix: str, width: int) -> list[Argument]:
    channels = 2 * width if layer.overlap else width
    ring = ("slots", f"{prefix}_ring", channels)
    keys = prefix == "i"
    row, scales = (width // 2, width // 32) if keys else (layer.row_bytes, KV_SCALES)
    float32, byte = torch.float32, torch.uint8
    return [
        Argument(f"{prefix}_kv", float32, ("rows", channels)),
        Argument(f"{prefix}_gate", float32, ("rows", channels)),
        Argument(f"{prefix}_ape", float32, (layer.ratio, channels)),
        Argument(f"{prefix}_norm", float32, (width,)),
        Argument(f"{prefix}_ring_kv", float32, ring, "inout"),
        Argument(f"{prefix}_ring_gate", float32, ring, "inout"),
        Argument(f"{prefix}_entries", byte, ("slots", f"{prefix}_capacity", row), "inout"),
        Argument(
            f"{prefix}_scales", byte, ("slots", f"{prefix}_capacity", scales), "inout", align=4
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence: `count` from position `first` on, in caches `slot`."""

    slot: int
    first: int
    count: int = 1


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Each kind of layer at 8k tokens; "entry" where the last token completes a block."""
    kinds = [AttentionKind.SLIDING] if 0 in config.compress_ratios else []
    for kind in (*kinds, AttentionKind.CSA, AttentionKind.HCA):
        layer = Layer.of(config, kind)
        for count in rows:
            ends = {"": 8190, " entry": 8192} if layer.ratio else {"": 8192}
            for suffix, end in ends.items():
                runs = [Run(0, end - count, count)]
                yield case(layer, f"{kind.value}{suffix}", model, runs)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Block boundaries, wraps, first tokens, several sequences, prefill, extreme magnitudes."""
    placed = {
        "first tokens": [Run(0, 0, 8)],
        "first of all": [Run(1, 0)],
        "wrap": [Run(0, 131, 8)],
        "block ends": [Run(0, 127)],
        "sequences": [Run(2, 5, 3), Run(0, 126, 3), Run(1, 65535, 1), Run(3, 250, 6)],
        "one absent": [Run(0, 124, 4), Run(1, -1)],
        "past 65536": [Run(0, 65660, 4)],
        "prefill": [Run(0, 0, 512)],
        "prefill on": [Run(1, 251, 517)],
    }
    wide = dataclasses.replace(Layer.of(config, AttentionKind.SLIDING), latent=config.hidden_size)
    yield case(wide, "norm of a draft's context", model, [Run(0, -1)] * 6)
    scales = {"": 1.0, " zeros": 0.0, " tiny": 1e-7, " huge": 1e6}
    for kind in AttentionKind:
        layer = Layer.of(config, kind)
        for name, runs in placed.items():
            yield case(layer, f"{kind.value} {name}", model, runs, slots=4)
        for suffix, scale in scales.items():
            for inputs in ("float32", "bfloat16"):
                runs = [Run(0, 120, 8)]
                yield case(layer, f"{kind.value} {inputs}{suffix}", model, runs, 1, scale, inputs)


def case(
    layer: Layer,
    shape: str,
    model: str,
    runs: Sequence[Run],
    slots: int = 1,
    scale: float = 1.0,
    inputs: str = "float32",
) -> Case:
    """A step of `runs`. scale: of the projections' results."""
    rows = sum(run.count for run in runs)
    longest = max(run.first + run.count for run in runs)
    kernel_ = append(layer, inputs)

    def make(rng: torch.Generator) -> Buffers:
        sizes = {
            "rows": rows,
            "slots": slots,
            "positions": longest + 1,
            "window": layer.window + rows - 1,
        }
        for prefix in layer.widths():
            sizes[f"{prefix}_ring"] = layer.ratio * (2 if layer.overlap else 1) + rows - 1
            sizes[f"{prefix}_capacity"] = longest // layer.ratio + 1
        buffers: Buffers = {}
        for argument in kernel_.leaves():
            shape = [sizes[n] if isinstance(n, str) else n for n in argument.shape]
            buffers[argument.name] = _random(argument, shape, scale, rng)
        return buffers | _places(layer, runs, longest + 1, rng.device)

    return Case(
        "append",
        shape,
        model,
        rows,
        (Launch(kernel_),),
        _touched(layer, runs),
        make,
        lambda buffers: expect(layer, buffers),
        cold=tuple(n for n in ("c_ring_kv", "c_ring_gate") if layer.ratio),
        note="one launch",
    )


def _random(
    argument: Argument, shape: list[int], scale: float, rng: torch.Generator
) -> torch.Tensor:
    """Caches of any bytes; norms about 1; gates some units apart; the rest normal."""
    if argument.dtype in (torch.uint8, torch.int32):
        high = 256 if argument.dtype == torch.uint8 else 1
        some = torch.randint(high, shape, generator=rng, device=rng.device)
        return some.to(torch.uint8 if high > 1 else torch.int32)
    normal = torch.randn(shape, generator=rng, device=rng.device)
    if argument.name.endswith("norm"):
        normal = 1 + 0.3 * normal
    elif argument.name.endswith(("gate", "ape")):
        normal = 3 * normal
    else:
        normal = scale * normal
    return normal.to(torch.bfloat16) if argument.dtype == torch.bfloat16 else normal


def _places(layer: Layer, runs: Sequence[Run], length: int, device: torch.device) -> Buffers:
    """Rows' positions and slots, and the tables of a window layer or of a compressed one."""
    position = torch.cat([torch.arange(run.first, run.first + run.count) for run in runs])
    slot = torch.cat([torch.full((run.count,), run.slot) for run in runs])
    frequencies = inverse_frequencies(layer.rope, layer.theta, layer.yarn)
    cos, sin = rope_table(frequencies, torch.arange(length, device=device))
    return {
        "position": position.to(torch.int32).to(device),
        "slot": slot.to(torch.int32).to(device),
        "cos": cos,
        "sin": sin,
    }


def _touched(layer: Layer, runs: Sequence[Run]) -> int:
    """Bytes read and written once."""
    rows = sum(run.count for run in runs)
    total = rows * (6 * layer.latent + 4 * layer.width + layer.row_bytes + KV_SCALES)
    total += 4 * (layer.latent + layer.width)
    for prefix, width in layer.widths().items():
        channels = 2 * width if layer.overlap else width
        ended = sum((r.first + r.count) // layer.ratio - r.first // layer.ratio for r in runs)
        total += rows * 5 * 4 * channels  # inputs, ape, rings
        total += ended * (2 * 4 * layer.ratio * channels + (68 if prefix == "i" else 584))
    return total
