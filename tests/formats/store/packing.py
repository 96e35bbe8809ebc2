"""A small store with one array of every kind, written through StoreWriter, for the tests here.

The physical bytes are cut from the logical arrays by the definition (chunks in C order of the
chunk grid), with numpy alone, so that reader and writer are held against something else.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import LAYOUTS, pack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, quantize_nvfp4
from dsv4.formats.store.specs import (
    FP8_LAYOUT,
    MARKER,
    NODE_DOCUMENT,
    NVFP4_LAYOUT,
    ArraySpec,
    FileSpec,
)
from dsv4.formats.store.writer import StoreWriter

IDENTITY = {"tool": "dsv4 test", "recipe": "standard", "source": {"name": "sample"}}
ASSETS = {"tokenizer.json": b'{"model": {}}', "LICENSE": b"MIT\n", "empty.txt": b""}
EXPERTS, HIDDEN, INTER = 4, 256, 128
STACK = "layers.0.ffn.experts"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Everything StoreWriter needs, and what the arrays must read as.

    logical: array path -> the array in its logical order, as unsigned integers of its width.
    nvfp4: hub name -> the quantised tensor before packing. fp8: codes and scales of `wq_a`.
    """

    arrays: tuple[ArraySpec, ...]
    groups: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    logical: dict[str, np.ndarray[Any, Any]]
    nvfp4: dict[str, NVFP4Tensor]
    fp8: tuple[Tensor, Tensor]

    def files(self) -> Iterator[tuple[FileSpec, list[Tensor]]]:
        """Every file with the parts of its payload."""
        for spec in self.arrays:
            for file in spec.files():
                yield file, physical_parts(spec, file, self.logical[spec.path])


def config() -> ModelConfig:
    """A valid model configuration; its values mean nothing to the store."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=32,
        q_lora_rank=64,
        o_lora_rank=64,
        o_groups=2,
        moe_intermediate_size=INTER,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hash_layers=1,
        compress_ratios=(0,),
    )


def manifest() -> dict[str, Any]:
    """The sections a converter passes to `finish`."""
    return {
        "tool": IDENTITY["tool"],
        "config": config().to_dict(),
        "recipe": {"name": "standard", "keep": []},
        "source": {
            "files": [{"name": f"{n}.safetensors", "bytes": 4096, "sha256": n * 64} for n in "ab"]
        },
        "origin": {"kind": "local"},
        "layouts": {layout.id: dict(layout.parameters) for layout in LAYOUTS.values()},
    }


def plain(name: str, **extra: Any) -> dict[str, Any]:
    """Attributes of an unquantised tensor."""
    return {"dsv4": {"format": "plain", "names": [name], "exact": True, **extra}}


def physical_parts(spec: ArraySpec, file: FileSpec, logical: np.ndarray[Any, Any]) -> list[Tensor]:
    """The chunks of `file`, one tensor each, in C order of the chunk grid."""
    rows = logical[slice(*file.rows)] if spec.shape else logical
    parts = []
    for index in np.ndindex(*spec.file_grid):
        cut = tuple(
            slice(i * size, (i + 1) * size) for i, size in zip(index, spec.chunk, strict=True)
        )
        parts.append(torch.from_numpy(np.array(rows[cut], order="C")))
    return parts


@functools.cache
def sample(seed: int = 0) -> Sample:
    """One store's worth of arrays: plain, cut by rows, cut by columns, FP8, NVFP4, two stacks."""
    draw = torch.Generator().manual_seed(seed)
    builder = _Builder(draw)
    builder.plain("norm.weight", (HIDDEN,), "bfloat16")
    builder.plain("hc_head_scale", (1,), "float32")
    builder.plain("layers.0.ffn.gate.tid2eid", (64, 2), "int64")
    builder.plain("embed.weight", (64, HIDDEN), "bfloat16", chunk=(8, HIDDEN), shard=(32, HIDDEN))
    builder.plain("layers.0.attn.ape", (8, 64), "float32", chunk=(4, 16), shard=(8, 64))
    builder.fp8("layers.0.attn.wq_a.weight", (192, HIDDEN), slabs=2)
    builder.nvfp4("head.weight", (72, 100), slabs=1)
    builder.nvfp4("layers.0.attn.wo_b.weight", (HIDDEN, HIDDEN), slabs=4)
    builder.stack("w13", ("w1", "w3"), (INTER, HIDDEN), slabs=1, interleave=8)
    builder.stack("w2", ("w2",), (HIDDEN, INTER), slabs=2, interleave=0)
    return Sample(
        tuple(builder.arrays),
        builder.groups,
        manifest(),
        builder.logical,
        builder.quantized,
        builder.fp8_source,
    )


class _Builder:
    def __init__(self, draw: torch.Generator) -> None:
        self.draw = draw
        self.arrays: list[ArraySpec] = []
        self.groups: dict[str, dict[str, Any]] = {}
        self.logical: dict[str, np.ndarray[Any, Any]] = {}
        self.quantized: dict[str, NVFP4Tensor] = {}
        self.fp8_source: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def add(self, spec: ArraySpec, values: np.ndarray[Any, Any]) -> None:
        assert values.shape == spec.shape
        self.arrays.append(spec)
        self.logical[spec.path] = values

    def plain(
        self,
        name: str,
        shape: tuple[int, ...],
        element: str,
        chunk: tuple[int, ...] | None = None,
        shard: tuple[int, ...] | None = None,
    ) -> None:
        unsigned = {"bfloat16": torch.uint16, "float32": torch.uint32, "int64": torch.uint64}
        if element == "int64":
            values = torch.randint(0, EXPERTS, shape, generator=self.draw)
        else:
            values = torch.randn(shape, generator=self.draw).to(getattr(torch, element))
        path = name.replace(".", "/")
        attributes = plain(name, sources={"weight": [1, 64, 128]})
        spec = ArraySpec(path, shape, element, chunk or shape, shard or shape, attributes)
        self.add(spec, values.view(unsigned[element]).numpy())

    def fp8(self, name: str, shape: tuple[int, int], slabs: int) -> None:
        path = name.removesuffix(".weight").replace(".", "/")
        codes = torch.randn(shape, generator=self.draw).to(torch.float8_e4m3fn)
        tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
        scales = torch.randint(120, 130, tiles, generator=self.draw).to(torch.uint8)
        self.fp8_source = (codes, scales.view(torch.float8_e8m0fnu))
        self.groups[path] = _group("fp8", FP8_LAYOUT, slabs, 0, shape, [name])
        chunk = (shape[0], shape[1] // slabs)
        self.add(
            ArraySpec(f"{path}/codes", shape, "e4m3", chunk, shape),
            codes.view(torch.uint8).numpy(),
        )
        self.add(ArraySpec.whole(f"{path}/scales", tiles, "e8m0"), scales.numpy())

    def nvfp4(self, name: str, shape: tuple[int, int], slabs: int) -> None:
        path = name.removesuffix(".weight").replace(".", "/")
        part = quantize_nvfp4(torch.randn(shape, generator=self.draw), name=name)
        self.quantized[name] = part
        self.groups[path] = _group("nvfp4", NVFP4_LAYOUT, slabs, 0, shape, [name])
        packed = pack_nvfp4([part], slabs=slabs)
        for member, element, values in (
            ("codes", "e2m1x2", _join(packed.codes)),
            ("scales", "e4m3", _join(packed.scales)),
        ):
            size = values.shape
            chunk = (size[0], size[1] // slabs, *size[2:])
            self.add(ArraySpec(f"{path}/{member}", size, element, chunk, size), values)
        bits = packed.global_scales.view(torch.uint32).numpy()
        self.add(ArraySpec.whole(f"{path}/global_scale", (1,), "float32"), bits)

    def stack(
        self,
        kind: str,
        projections: tuple[str, ...],
        shape: tuple[int, int],
        slabs: int,
        interleave: int,
    ) -> None:
        path = f"{STACK.replace('.', '/')}/{kind}"
        codes, scales, globals_ = [], [], []
        for expert in range(EXPERTS):
            parts = []
            for projection in projections:
                name = f"{STACK}.{expert}.{projection}.weight"
                weight = torch.randn(shape, generator=self.draw) * (expert + 1)
                parts.append(quantize_nvfp4(weight, name=name))
                self.quantized[name] = parts[-1]
            packed = pack_nvfp4(parts, slabs=slabs, interleave=interleave)
            codes.append(_join(packed.codes))
            scales.append(_join(packed.scales))
            globals_.append(packed.global_scales.view(torch.uint32).numpy())
        names = [f"{STACK}.{{e}}.{projection}.weight" for projection in projections]
        self.groups[path] = _group("nvfp4", NVFP4_LAYOUT, slabs, interleave, shape, names)
        row_cut = 4 if slabs == 1 else 1
        for member, element, values in (
            ("codes", "e2m1x2", np.stack(codes)),
            ("scales", "e4m3", np.stack(scales)),
        ):
            size = values.shape
            rows = size[1] // (row_cut if member == "codes" else 1)
            chunk = (1, rows, size[2] // slabs, *size[3:])
            shard = (EXPERTS // 2, *size[1:])
            self.add(ArraySpec(f"{path}/{member}", size, element, chunk, shard), values)
        count = (EXPERTS, len(projections))
        self.add(ArraySpec.whole(f"{path}/global_scale", count, "float32"), np.stack(globals_))
        lineage = np.arange(EXPERTS * len(projections) * 8).reshape(*count, 8).astype(np.uint64)
        lineage[..., 0], lineage[..., 3], lineage[..., 7] = 0, 1, 0
        self.add(ArraySpec.whole(f"{path}/lineage", (*count, 8), "int64"), lineage)


def _group(
    kind: str, layout: str, slabs: int, interleave: int, shape: tuple[int, int], names: list[str]
) -> dict[str, Any]:
    own = {
        "format": kind,
        "layout": layout,
        "parameters": {"slabs": slabs, "interleave": interleave},
        "shape": list(shape),
        "names": names,
        "exact": kind == "fp8",
        "sources": {"weight": [0, 8, 16], "scale": [0, 16, 24]},
        "rel_mse": 0.0078125,
    }
    return {"dsv4": own}


def _join(slabs: Tensor) -> np.ndarray[Any, Any]:
    """`[S, N, Ks, …]` -> `[N, S * Ks, …]`."""
    return np.concatenate(list(slabs.numpy()), axis=1)


def write(
    out: Path,
    what: Sample | None = None,
    order: Callable[[list[Any]], Iterable[Any]] = iter,
    identity: dict[str, Any] = IDENTITY,
) -> str:
    """Write (or go on writing) the sample's store; returns its root."""
    what = what or sample()
    with StoreWriter(out, identity) as writer:
        for file, parts in order(list(what.files())):
            if not writer.has(file):
                writer.write(file, parts)
        for name, data in ASSETS.items():
            writer.write_asset(name, data)
        return writer.finish(what.groups, what.arrays, what.manifest)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def edit_metadata(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the root's metadata as an attacker would: with the marker's hash made to fit."""
    document = json.loads((root / NODE_DOCUMENT).read_bytes())
    replaced = edit(document)
    put_metadata(root, json.dumps(document if replaced is None else replaced).encode())


def put_metadata(root: Path, raw: bytes) -> None:
    """Replace the root's metadata by `raw`, with the marker's hash made to fit."""
    (root / NODE_DOCUMENT).write_bytes(raw)
    marker = json.loads((root / MARKER).read_bytes())
    marker["metadata_sha256"] = hashlib.sha256(raw).hexdigest()
    (root / MARKER).write_text(json.dumps(marker))
