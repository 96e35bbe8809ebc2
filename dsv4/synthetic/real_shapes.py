"""Checkpoints of real shapes with meaningless numbers, written at disk speed.

Names, dtypes, shapes, shard layout and the order inside a shard (by alignment of the dtype, then
by name, as safetensors' writer has it) are those of the released Flash and Pro; of the layers only
as many as asked for. Bytes repeat a random tile, made valid per dtype, so nothing is trained and
nothing compresses either.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from dsv4.convert.sources.base import CONFIG_FILE
from dsv4.formats.errors import ConfigError, ConflictError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, Kind, parameters
from dsv4.formats.model.safetensors_header import DTYPE_BITS
from dsv4.synthetic.tiny import hub_config

SMALL_VOCABULARY = 1024

_TILE_BYTES = 16 << 20
_ALIGNMENT = {"F32": 0, "BF16": 1}  # wide dtypes first; bytes of every kind follow by name


class Stored(NamedTuple):
    """One entry of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def fresh_layers(
    config: ModelConfig, layers: int, experts: int | None = None, vocabulary: int | None = None
) -> ModelConfig:
    """`config` with `layers` scored CSA and HCA layers only; fewer experts and tokens if asked.

    Raises ConfigError for fewer experts than a token is sent to.
    """
    least, taps = config.num_experts_per_tok, len(config.dspark_target_layer_ids or ())
    if experts and experts < least:
        raise ConfigError(
            f"--experts {experts} are too few, because each token goes to {least}; give "
            f"--experts {least} or more, or 0 for all {config.n_routed_experts}"
        )
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        num_hash_layers=0,
        compress_ratios=tuple(itertools.islice(itertools.cycle((4, 128)), layers)),
        n_routed_experts=experts or config.n_routed_experts,
        vocab_size=vocabulary or config.vocab_size,
        dspark_noise_token_id=(vocabulary or config.vocab_size) - 1 if taps else None,
        dspark_target_layer_ids=tuple(range(layers - taps, layers)) if taps else None,
    )


def write_checkpoint(out: Path, config: ModelConfig) -> int:
    """Write a checkpoint of `config` into the empty directory `out`; -> its bytes.

    Raises ConflictError when `out` is not an empty directory.
    """
    if out.exists() and any(out.iterdir()):
        raise ConflictError(f"{out} is not an empty directory; choose another one")
    out.mkdir(parents=True, exist_ok=True)
    shards = shards_of(config)
    tiles = _tiles()
    for name, tensors in shards.items():
        with (out / f"{name}.safetensors").open("wb") as file:
            _write_shard(file, tensors, tiles)
    (out / CONFIG_FILE).write_text(json.dumps(hub_config(config, DraftKind.NONE)))
    return checkpoint_bytes(config)


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors that `write_checkpoint` writes."""
    return sum(tensor.nbytes for shard in shards_of(config).values() for tensor in shard)


def shards_of(config: ModelConfig, draft: DraftKind = DraftKind.NONE) -> dict[str, list[Stored]]:
    """What each shard of a release holds, by its name, in the order of the file.

    draft: MTP adds the one draft stage that the releases have, DSpark those of the configuration.
    """
    shards: dict[str, list[Stored]] = {}
    stages = {DraftKind.NONE: 0, DraftKind.MTP: 1, DraftKind.DSPARK: config.num_draft_layers}
    for parameter in parameters(config, draft, stages[draft]):
        head, layer, *_ = [*parameter.name.split("."), ""]
        shard = f"{head}-{layer}" if head in ("layers", "mtp") else "embed-and-head"
        shard = shard.replace("layers-", "layer-")
        shards.setdefault(shard, []).extend(
            _stored(parameter.name, parameter.kind, parameter.shape)
        )
    return {name: sorted(found, key=_position) for name, found in shards.items()}


def _stored(name: str, kind: Kind, shape: tuple[int, ...]) -> Iterator[Stored]:
    """What the official release stores for a parameter."""
    scale = name.removesuffix("weight") + "scale"
    match kind:
        case Kind.EXPERT:
            yield Stored(name, "I8", (shape[0], shape[1] // 2))
            yield Stored(scale, "F8_E8M0", (shape[0], shape[1] // 32))
        case Kind.LINEAR:
            yield Stored(name, "F8_E4M3", shape)
            yield Stored(scale, "F8_E8M0", (-(-shape[0] // 128), -(-shape[1] // 128)))
        case _:
            yield Stored(name, {Kind.TABLE: "I64", Kind.FLOAT32: "F32"}.get(kind, "BF16"), shape)


def _position(tensor: Stored) -> tuple[int, int, str]:
    """Where safetensors' writer puts a tensor: scales before weights, names as text."""
    kind = _ALIGNMENT.get(tensor.dtype, 2)
    return kind, 0 if tensor.dtype == "F8_E8M0" else 1, tensor.name


def _tiles() -> dict[str, bytes]:
    """A valid tile of bytes for every dtype that an official shard has."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(_TILE_BYTES // 4, generator=rng) * 0.02
    any_byte = torch.randint(256, (_TILE_BYTES,), generator=rng, dtype=torch.uint8)
    exponents = torch.randint(112, 120, (_TILE_BYTES,), generator=rng, dtype=torch.uint8)
    return {
        "F32": noise.numpy().tobytes(),
        "BF16": noise.repeat(2).to(torch.bfloat16).view(torch.uint8).numpy().tobytes(),
        "I8": any_byte.numpy().tobytes(),
        "F8_E4M3": any_byte.bitwise_and(0xF7).numpy().tobytes(),  # never NaN
        "F8_E8M0": exponents.numpy().tobytes(),
        "I64": bytes(_TILE_BYTES),
    }


def _write_shard(file: BinaryIO, tensors: list[Stored], tiles: dict[str, bytes]) -> None:
    header: dict[str, object] = {}
    begin = 0
    for tensor in tensors:
        offsets = [begin, begin + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        begin += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for number, tensor in enumerate(tensors):
        tile = memoryview(tiles[tensor.dtype])
        shift = number * 4096 % (_TILE_BYTES // 2)  # no two tensors begin alike
        left = tensor.nbytes
        while left:
            piece = tile[shift : shift + left]
            file.write(piece)
            left -= len(piece)
            shift = 0
