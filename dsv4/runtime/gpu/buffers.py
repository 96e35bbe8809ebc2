"""Everything that a session's launches write: caches, activations, scratch. Allocated once.

Rings are longer than what is seen by the most rows a step may write, so that a step hides nothing
from its own first token. Layouts: `ops.kv_cache`, `ops.attention`.
"""

from __future__ import annotations

import torch

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.ops.sampling import contract as sampling
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table


def caches(config: ModelConfig, capacity: int, rows: int, device: torch.device) -> Buffers:
    """Empty caches of one sequence of up to `capacity` tokens, written `rows` at once, by layer."""
    found: Buffers = {}
    for layer in range(config.num_hidden_layers):
        kind = config.attention_kind(layer)
        sizes = cache_sizes(config, kind, capacity, rows)
        for one in append.append(append.Layer.of(config, kind)).leaves():
            if one.role != "inout":
                continue
            assert isinstance(one.dtype, torch.dtype)
            shape = tuple(sizes[n] if isinstance(n, str) else n for n in one.shape)
            found[f"layers.{layer}.{one.name}"] = torch.zeros(shape, dtype=one.dtype, device=device)
    clear(found)
    return found


def clear(caches: Buffers) -> None:
    """Forget the blocks in progress: gates of -inf weigh nothing. All else is by position."""
    for name, tensor in caches.items():
        if name.endswith("ring_gate"):
            tensor.fill_(float("-inf"))
        elif name.endswith("ring_kv"):
            tensor.zero_()


def cache_sizes(
    config: ModelConfig, kind: AttentionKind, capacity: int, rows: int
) -> dict[str, int]:
    """Sizes by the names that `append` gives them. rows: the most of a step."""
    layer, more = append.Layer.of(config, kind), rows - 1
    sizes = {"slots": 1, "window": config.sliding_window + more}
    if layer.ratio:
        ring = (2 if layer.overlap else 1) * layer.ratio + more
        entries = max(1, -(-capacity // layer.ratio // 4) * 4)
        sizes |= {f"{p}_{n}": v for p in "ci" for n, v in (("ring", ring), ("capacity", entries))}
    return sizes


def tables(config: ModelConfig, capacity: int, device: torch.device) -> Buffers:
    """Angles by position: "sliding.cos" and the like, float32 `[capacity, rope / 2]`."""
    c, found = config, {}
    positions = torch.arange(capacity, device=device)
    for name, theta, yarn in (
        ("sliding", c.rope_theta, None),
        ("compressed", c.compress_rope_theta, c.yarn),
    ):
        frequencies = inverse_frequencies(c.qk_rope_head_dim, theta, yarn)
        found[f"{name}.cos"], found[f"{name}.sin"] = rope_table(frequencies, positions)
    return found


def tables_nbytes(config: ModelConfig, positions: int) -> int:
    """What `tables` takes, with what it needs while it computes them in FP64."""
    return positions * config.qk_rope_head_dim // 2 * (4 * 4 + 3 * 8)


def inputs(config: ModelConfig, rows: int, device: torch.device) -> Buffers:
    """What the host tells a step, a row for each token; `ids` is where a drawn token goes."""
    found: Buffers = {
        name: torch.zeros(rows, dtype=torch.int32, device=device)
        for name in ("ids", "position", "slot")
    }
    for one in sampling.sampling(config.vocab_size).leaves():
        if one.shape == ("rows",) and one.name not in ("position", "token"):
            assert isinstance(one.dtype, torch.dtype)
            found[one.name] = torch.zeros(MAX_ROWS, dtype=one.dtype, device=device)
    return found
