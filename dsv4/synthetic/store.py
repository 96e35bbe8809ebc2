"""Packed stores of real shapes with meaningless numbers, made in seconds, without a source.

Nodes, shapes, cuts, layouts and metadata are what a conversion of the release would write, because
its own plan makes them; only the numbers come from tiles of random bytes that are valid for their
element: every code is a number, every scale is positive and finite, activations keep their size.
`dsv4 validate` finds nothing wrong with such a store. Nothing is synced to disk file by file, so
the store is for measuring, not for keeping.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv4.convert.metadata import describe, manifest_of, unmeasured
from dsv4.convert.outputs.base import Output
from dsv4.convert.outputs.dense import Nvfp4Output
from dsv4.convert.outputs.results import Result
from dsv4.convert.outputs.stack import ExpertsOutput
from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.sources.base import CONFIG_FILE, ByteStream, Source
from dsv4.formats.errors import SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import DEFAULT_RECIPE, make_recipe
from dsv4.formats.model.releases import DRAFTING, MODELS
from dsv4.formats.model.safetensors_header import DTYPE_BITS, TensorEntry
from dsv4.formats.numeric.layouts import pack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import NVFP4_K_ALIGN, SF_ROWS
from dsv4.formats.store.digest import dense_index
from dsv4.formats.store.durable import Directories, storage_errors, write_all
from dsv4.formats.store.file_digest import FileDigest
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import ArraySpec, FileSpec
from dsv4.formats.store.writer import StoreWriter
from dsv4.synthetic.disk_space import require_space
from dsv4.synthetic.real_shapes import fresh_layers, shards_of
from dsv4.synthetic.tiny import hub_config

GLOBAL_SCALE = 2.0**-8
PIECE_BYTES = 1 << 20  # hashed and written while it is in a core's cache
TILE_BYTES = 16 << 20
_SHIFT = 4099 * 512  # no two files begin alike; a multiple of every element and of 512


@dataclasses.dataclass(frozen=True)
class Made:
    """A store that was made. nbytes: of all array files; written: on the disk, of these."""

    path: Path
    root: str
    nbytes: int
    files: int
    seconds: float
    written: int


def make_store(
    out: Path,
    config: ModelConfig,
    *,
    recipe: str = DEFAULT_RECIPE,
    draft: DraftKind = DraftKind.NONE,
    workers: int | None = None,
    distinct: int | None = None,
) -> Made:
    """Write the store of a model of `config` into the empty directory `out`.

    distinct: so many layers have their own numbers in a file of the same name and size; the others
    share theirs, and one file on the disk serves all that share (hard links). The manifest says of
    every file what is in it. None: all have their own.

    Raises OutOfSpaceError when it does not fit, ConflictError when there is something else.
    """
    begin = time.perf_counter()
    plan = plan_store(config, recipe, draft)
    work = _work(plan, distinct or config.num_hidden_layers)
    written = sum(one.file.nbytes for one in work if one.same_as is None)
    require_space(out.parent, written)
    results = dict(_results(plan))
    identity = {"tool": "dsv4 bench", "config": config.to_dict(), "recipe": recipe}
    with StoreWriter(out, identity) as writer:
        writer.adopt(_write_arrays(out, plan, work, workers or len(os.sched_getaffinity(0))))
        if draft is DraftKind.DSPARK:  # part of what it needs is said there alone
            writer.write_asset(CONFIG_FILE, json.dumps(hub_config(config, draft)).encode())
        groups, arrays, _ = describe(plan, results)
        root = writer.finish(groups, arrays, manifest_of(plan, _DESCRIPTION, _ORIGIN))
    files = sum(1 for _ in plan.files())
    return Made(out, root, plan.output_bytes, files, time.perf_counter() - begin, written)


def plan_store(
    config: ModelConfig, recipe: str = DEFAULT_RECIPE, draft: DraftKind = DraftKind.NONE
) -> Plan:
    """What a conversion of the release with this configuration would write."""
    return make_plan(_Headers(config, draft), make_recipe(recipe))


def shaped(
    model: str, layers: int, experts: int = 0, vocabulary: int = 0, *, dspark: bool = False
) -> ModelConfig:
    """The configuration of `layers` layers of "flash" or "pro"; 0: as many as the release has.
    dspark: with DSpark's draft layers, which read the last of them.
    """
    whole = (DRAFTING if dspark else MODELS)[model]
    return fresh_layers(whole, layers, experts or None, vocabulary or None)


def _results(plan: Plan) -> Iterator[tuple[str, Result]]:
    for output in plan.outputs:
        for unit, result in unmeasured(output, GLOBAL_SCALE):
            yield unit.key, result


_DESCRIPTION: dict[str, Any] = {"files": []}
_ORIGIN = {"kind": "synthetic"}


class _Headers(Source):
    """The headers of a release: enough for a plan; there are no bytes behind them."""

    def __init__(self, config: ModelConfig, draft: DraftKind) -> None:
        self.config = hub_config(config, draft)
        entries: dict[str, TensorEntry] = {}
        sizes: dict[str, int] = {}
        for shard, tensors in shards_of(config, draft).items():
            begin, file = 0, f"{shard}.safetensors"
            for tensor in tensors:
                end = begin + math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8
                entries[tensor.name] = TensorEntry(
                    tensor.name, tensor.dtype, tensor.shape, begin, end, file
                )
                begin = end
            sizes[file] = begin
        self.entries, self.sizes = entries, sizes

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        raise SourceError(f"{file}: {what} is synthetic and has no source")

    def stream(self, file: str) -> AbstractContextManager[ByteStream]:
        raise SourceError(f"{file} is synthetic and has no source")

    def aux_files(self) -> Mapping[str, bytes]:
        return {}

    def fingerprint(self) -> str:
        return "synthetic"


class _Work(NamedTuple):
    """A file of the array `spec`. exact: its bytes, where no tile serves; same_as: the number of
    the file before it that it shares its bytes with.
    """

    file: FileSpec
    spec: ArraySpec
    exact: bytes | None
    same_as: int | None


def _work(plan: Plan, distinct: int) -> list[_Work]:
    found: list[_Work] = []
    alike: dict[tuple[object, ...], list[int]] = {}
    for output in plan.outputs:
        exact = dict(_exact(output))
        for spec, file in ((one, file) for one in output.arrays() for file in one.files()):
            own = exact.get(spec.path)
            name = re.sub(r"^layers/\d+/", "layers/", file.key)
            same = alike.setdefault((name, file._replace(key=""), own), [])
            layer = int(file.key.split("/")[1]) if name != file.key else 0
            number = same[layer % distinct] if len(same) == distinct else None
            if number is None:
                same.append(len(found))
            found.append(_Work(file, spec, own, number))
    return found


def _write_arrays(
    out: Path, plan: Plan, work: Sequence[_Work], workers: int
) -> dict[str, FileRecord]:
    tiles = _Tiles(plan.config.n_routed_experts)
    directories = Directories(out)
    for one in work:
        directories.ensure(one.file.key.rpartition("/")[0])
    own = [index for index, one in enumerate(work) if one.same_as is None]
    own.sort(key=lambda index: -work[index].file.nbytes)

    def write(index: int) -> tuple[str, FileRecord]:
        file, spec, exact, _ = work[index]
        pieces = [memoryview(exact)] if exact is not None else tiles.pieces(spec, file, index)
        return file.key, _write(out, file, pieces)

    with storage_errors(out, "writing"), ThreadPoolExecutor(workers) as pool:
        records = dict(pool.map(write, own))
        for one in work:
            if one.same_as is not None:
                first = work[one.same_as].file.key
                os.link(out / first, out / one.file.key)
                records[one.file.key] = records[first]
    return records


def _exact(output: Output) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of small arrays that no tile serves."""
    if isinstance(output, ExpertsOutput):
        count = len(output.experts)
        lineage = np.full((count, output.projections, 8), -1, "<i8")
        lineage[..., 6:] = 0
        yield f"{output.path}/lineage", lineage.tobytes()
    elif isinstance(output, Nvfp4Output):
        rows, cols = output.tensor.shape
        if rows % SF_ROWS or cols % NVFP4_K_ALIGN:  # padding has to be zero
            draw = torch.Generator().manual_seed(rows)
            codes = torch.randint(256, (rows, cols // 2), generator=draw, dtype=torch.uint8)
            scales = torch.randint(48, 64, (rows, cols // 16), generator=draw, dtype=torch.uint8)
            whole = NVFP4Tensor(codes, scales, torch.tensor(GLOBAL_SCALE), (rows, cols))
            packed = pack_nvfp4([whole], slabs=output.slabs)
            yield f"{output.path}/codes", packed.codes.numpy().tobytes()
            yield f"{output.path}/scales", packed.scales.numpy().tobytes()


class _Tiles:
    """Random bytes for every kind of array."""

    def __init__(self, experts: int) -> None:
        draw = np.random.default_rng(0)
        noise = draw.standard_normal(TILE_BYTES // 4, np.float32) * np.float32(0.02)
        anything = draw.integers(0, 256, TILE_BYTES, np.uint8)
        half = torch.from_numpy(noise).repeat(2).to(torch.bfloat16)
        self._tiles = {
            "e2m1x2": anything,
            "e4m3": anything & np.uint8(0xF7),  # never NaN
            "scales": 48 + (anything & np.uint8(15)),  # E4M3 0.5 to 1.875
            "e8m0": 112 + (anything & np.uint8(7)),
            "bfloat16": half.view(torch.uint8).numpy(),
            "float32": noise.view(np.uint8),
            "global_scale": np.full(TILE_BYTES // 4, GLOBAL_SCALE, "<f4").view(np.uint8),
            "int64": (np.arange(TILE_BYTES // 8) % experts).astype("<i8").view(np.uint8),
        }

    def pieces(self, spec: ArraySpec, file: FileSpec, number: int) -> Iterator[memoryview]:
        """The payload of `file`, the store's file `number`."""
        member = spec.path.rpartition("/")[2]
        nvfp4_scales = member == "scales" and spec.element == "e4m3"
        kind = "scales" if nvfp4_scales else member if member == "global_scale" else spec.element
        tile = self._tiles[kind].data
        at, left = number * _SHIFT % TILE_BYTES, file.payload_nbytes
        while left:
            piece = tile[at : at + min(left, PIECE_BYTES)]
            yield piece
            left -= len(piece)
            at = (at + len(piece)) % TILE_BYTES


def _write(
    out: Path, file: FileSpec, pieces: Iterator[memoryview] | list[memoryview]
) -> FileRecord:
    checksums = FileDigest(file.chunk_nbytes)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(out / file.key, flags, 0o644)
    try:
        for piece in pieces:
            write_all(descriptor, piece)
            checksums.payload(piece)
        if file.sharded:
            index = dense_index(file.chunks, file.chunk_nbytes)
            write_all(descriptor, index)
            checksums.index(index)
    finally:
        os.close(descriptor)
    blake3, xxh3 = checksums.finish()
    return FileRecord(file.nbytes, blake3, file.chunk_nbytes, xxh3)
