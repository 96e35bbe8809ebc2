"""Random weights in the official encodings, made to catch mistakes rather than to look tidy.

Every tensor is drawn from SHAKE-128 of (seed, name) with integer arithmetic, so a name always gives
the same bytes, on any machine and in any order. Scales keep activations near 1 and the experts'
pre-activations far from the SwiGLU clamp, so that no layer is drowned and no error is hidden.

Each expert matrix holds, at random places: every E2M1 code with negative zero, a zero block whose
scale byte is 0, a block of zeros of both signs under an ordinary scale, and block exponents that
span exactly 17 powers of two, the widest that NVFP4 carries exactly. FP8 scales differ by tile.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import Kind, Parameter
from dsv4.formats.numeric.codecs import MXFP4_BLOCK
from dsv4.formats.numeric.operands import FP8_BLOCK

Encoder = Callable[[Parameter, ModelConfig, int], dict[str, Tensor]]
"""(parameter, config, seed) -> the stored tensors of one dialect, by name."""

E8M0_BIAS = 127
EXACT_SPAN = 17  # log2 of the largest over the smallest power of two among E4M3 scales
NEGATIVE_ZERO = 8
E2M1_RMS = 2.926  # of the 16 codes, uniformly drawn
FP8_MIN_DEVIATION = 64  # of the codes; at most twice as much, so 3.46 deviations stay below 448

Int16s = np.ndarray[tuple[int], np.dtype[np.int16]]


def _rms(exponents: Int16s) -> float:
    return math.sqrt(float(np.mean(np.exp2(2.0 * exponents))))


_TILE_EXPONENTS = np.array([-1, 0, 1], dtype=np.int16)

# Exponents of expert blocks relative to the tensor's base, as often as listed of 256.
_BLOCK_EXPONENTS = np.repeat([1, 0, -1, -2, -6, -11], [51, 102, 64, 26, 8, 5]).astype(np.int16)
_BLOCK_RMS = _rms(_BLOCK_EXPONENTS)
_TOP_EXPONENT = int(_BLOCK_EXPONENTS.max())

# Standard deviation of a matrix is gain / sqrt(columns). Attention averages over many entries and
# SwiGLU shrinks its input, so the matrices behind them make up for it.
_GAINS = {
    "head": 2.0,
    "wo_b": 6.0,
    "w2": 2.0,
    "gate": 1.5,
}
COMPRESSED_NORM = 2.0  # one compressed entry must be heard among 128 window positions
SINK_MEAN = 2.0  # and so must the sink
EXPERT_W2_GAIN = 8.0  # each token mixes a few experts, whose outputs partly cancel


def official_tensors(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """One parameter's stored tensors in the official dialect, by name."""
    name, shape = parameter.name, parameter.shape
    match parameter.kind:
        case Kind.EXPERT:
            weight, scale = _fp4(seed, name, shape, expert_spread(parameter))
            return {name: weight, scale_name(name): scale}
        case Kind.LINEAR:
            weight, scale = fp8_tensors(seed, name, shape, _spread(name, shape))
            return {name: weight, scale_name(name): scale}
        case Kind.TABLE:
            return {name: _expert_table(seed, name, shape, config.n_routed_experts)}
        case Kind.FLOAT32:
            return {name: _float32(seed, name, shape)}
        case Kind.PLAIN:
            return {name: _plain(seed, name, shape).to(torch.bfloat16)}


def expert_spread(parameter: Parameter) -> float:
    """Standard deviation of an expert matrix."""
    gain = EXPERT_W2_GAIN if parameter.name.endswith("w2.weight") else 1.0
    return gain / math.sqrt(parameter.shape[-1])


def scale_name(weight_name: str) -> str:
    """The block scales' name of a quantised weight: `X.weight` -> `X.scale`."""
    return weight_name.removesuffix("weight") + "scale"


def _bytes(
    seed: int, name: str, purpose: str, count: int
) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    stream = hashlib.shake_128(f"{seed}/{name}/{purpose}".encode()).digest(count)
    return np.frombuffer(stream, dtype=np.uint8)


def noise(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Bell-shaped float32 of unit variance within +-3.46: the sum of four random bytes."""
    parts = _bytes(seed, name, "noise", 4 * math.prod(shape)).reshape(-1, 4)
    total = parts.sum(axis=1, dtype=np.int32) - 510
    deviation = math.sqrt(4 * (256**2 - 1) / 12)
    return torch.from_numpy(total.astype(np.float32) / np.float32(deviation)).reshape(shape)


def _spread(name: str, shape: tuple[int, ...]) -> float:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return _GAINS.get(leaf, 1.0) / math.sqrt(shape[-1])


def _plain(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    drawn = noise(seed, name, shape)
    if len(shape) == 1:  # a norm
        return (
            COMPRESSED_NORM if name.endswith("attn.compressor.norm.weight") else 1
        ) + 0.1 * drawn
    if name == "embed.weight" or name.endswith("markov_w1.weight"):
        return drawn
    return drawn * _spread(name, shape)


def _float32(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    drawn = noise(seed, name, shape)
    if name.endswith("_fn"):
        return drawn / math.sqrt(shape[-1])
    if name.endswith("_scale"):
        return 1 + 0.3 * drawn
    if name.endswith(".ape"):
        return 0.5 * drawn
    if name.endswith(".gate.bias"):
        return 0.1 * drawn
    if name.endswith(".attn_sink"):
        return SINK_MEAN + drawn
    return drawn  # hc_*_base


def _expert_table(seed: int, name: str, shape: tuple[int, ...], experts: int) -> Tensor:
    """tid2eid: in every row distinct experts, in random order."""
    rows, topk = shape
    keys = _bytes(seed, name, "table", 4 * rows * experts).view("<u4").reshape(rows, experts)
    chosen = np.argsort(keys, axis=1, kind="stable")[:, :topk]
    return torch.from_numpy(chosen.astype(np.int64))


def fp8_tensors(
    seed: int, name: str, shape: tuple[int, ...], spread: float
) -> tuple[Tensor, Tensor]:
    """-> E4M3 codes `[out, in]`, E8M0 scales `[ceil(out/128), ceil(in/128)]`."""
    tiles = tuple(-(-size // FP8_BLOCK) for size in shape)
    picks = _bytes(seed, name, "tiles", math.prod(tiles)) % len(_TILE_EXPONENTS)
    exponents = _TILE_EXPONENTS[picks]
    inner = spread / _rms(exponents)
    base = math.floor(math.log2(inner / FP8_MIN_DEVIATION))
    codes = noise(seed, name, shape) * (inner / 2.0**base)
    return codes.to(torch.float8_e4m3fn), _e8m0(exponents + base, tiles)


def _fp4(seed: int, name: str, shape: tuple[int, ...], spread: float) -> tuple[Tensor, Tensor]:
    """-> packed E2M1 codes I8 `[out, in/2]`, E8M0 scales `[out, in/32]`."""
    rows, cols = shape
    blocks = rows * cols // MXFP4_BLOCK
    packed = _bytes(seed, name, "codes", rows * cols // 2).reshape(blocks, MXFP4_BLOCK // 2).copy()
    base = round(math.log2(spread / (E2M1_RMS * _BLOCK_RMS)))
    exponents = base + _BLOCK_EXPONENTS[_bytes(seed, name, "exponents", blocks)]
    order = np.argsort(_bytes(seed, name, "places", 4 * blocks).view("<u4"), kind="stable")
    empty, signed_zeros, top, bottom = order[:4]
    packed[empty] = 0
    packed[signed_zeros] &= NEGATIVE_ZERO << 4 | NEGATIVE_ZERO
    exponents[empty] = -E8M0_BIAS  # scale byte 0
    exponents[top] = base + _TOP_EXPONENT
    exponents[bottom] = base + _TOP_EXPONENT - EXACT_SPAN
    codes = torch.from_numpy(packed.view(np.int8)).reshape(rows, cols // 2)
    return codes, _e8m0(exponents, (rows, cols // MXFP4_BLOCK))


def _e8m0(exponents: Int16s, shape: tuple[int, ...]) -> Tensor:
    scales = (exponents + E8M0_BIAS).astype(np.uint8).reshape(shape)
    return torch.from_numpy(scales).view(torch.float8_e8m0fnu)
