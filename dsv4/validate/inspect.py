"""What `dsv4 inspect` shows: the tree with its sizes, or all that is known of one tensor."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint, Stored
from dsv4.formats.errors import StoreError
from dsv4.formats.model.user_names import matches
from dsv4.formats.numeric.codecs import e2m1_decode, e4m3_decode, unpack_nibbles
from dsv4.formats.numeric.layouts import unpack_fp8
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import FP8_BLOCK, NVFP4_BLOCK, Fp8Matrix
from dsv4.formats.plain_text import counted
from dsv4.formats.store.manifest import origin_of

_NUMBERED = ("layers", "mtp")
_SHOWN = 16


def tree(packed: PackedCheckpoint) -> dict[str, Any]:
    """`{"root", "tool", "recipe", "source", "absent", "bytes", "parts", "tensors"}`: JSON types.

    absent: parts that a pull left out, of which nothing else is said.
    parts: part -> `{"tensors", "bytes", "formats"}`; tensors: name -> format.
    """
    manifest = packed.store.manifest
    sizes: Counter[str] = Counter()
    for file in packed.store.files_under(None):
        sizes[_part(file.key.split("/"))] += file.nbytes
    formats: dict[str, Counter[str]] = {}
    tensors = {name: packed.format_of(name) for name in packed.names()}
    for name, kind in tensors.items():
        formats.setdefault(_part(name.split(".")), Counter())[kind] += 1
    for part in sizes.keys() - formats.keys():
        formats[part] = Counter()
    return {
        "root": manifest["root"],
        "tool": manifest["tool"],
        "recipe": manifest["recipe"],
        "source": origin_of(manifest),
        "absent": list(absent.parts) if (absent := packed.store.absent) else [],
        "bytes": sum(sizes.values()),
        "parts": {
            part: {
                "tensors": kinds.total(),
                "bytes": sizes[part],
                "formats": dict(sorted(kinds.items())),
            }
            for part, kinds in formats.items()
        },
        "tensors": tensors,
    }


def listing(packed: PackedCheckpoint, glob: str) -> dict[str, dict[str, Any]]:
    """name -> `{"format", "shape", "bytes"}` of every tensor whose name matches `glob`.

    bytes: its share of the store, scales and padding included. Raises StoreError for no match.
    """
    found = fnmatch.filter(packed.names(), glob)
    found = found or [name for name in packed.names() if matches(glob, name)]
    if not found:
        raise StoreError(
            f"{packed.store.root}: no tensor's name matches {glob!r}; expected a glob such as "
            "'layers.2.*' or '*.gate.weight'"
        )
    return {
        name: {
            "format": packed.format_of(name),
            "shape": list(packed.shape(name)),
            "bytes": packed.nbytes(name),
        }
        for name in found
    }


def tensor(packed: PackedCheckpoint, name: str) -> dict[str, Any]:
    """`PackedCheckpoint.provenance`, the source's repository and commit, and the first block.

    JSON types. Raises StoreError for an unknown name, with the globs that would list what has it in
    its name.
    """
    if name not in packed.names() and (hint := _globs(packed, name)):
        raise StoreError(f"{packed.store.root}: there is no tensor {name!r}; {hint}")
    facts = packed.provenance(name)
    manifest = packed.store.manifest
    digests = {file["name"]: file["sha256"] for file in manifest["source"].get("files", [])}
    for place in facts["sources"].values():
        place["sha256"] = digests.get(place["file"])
    facts["source"] = origin_of(manifest)
    facts["transforms"] = _transforms(facts)
    facts["first_block"] = _first_block(packed.stored(name)) | _first_bytes(packed, facts)
    return facts


def _globs(packed: PackedCheckpoint, part: str) -> str | None:
    """What to give for a part of names: of whole components, or of any. None where none has it."""
    for glob in (f"{part}.*", f"*.{part}.*", f"*{part}*"):
        if found := fnmatch.filter(packed.names(), glob):
            return f"'{glob}' lists {counted(len(found), 'tensor')}"
    return None


def _part(components: list[str]) -> str:
    return ".".join(components[:2]) if components[0] in _NUMBERED else components[0]


def _transforms(facts: dict[str, Any]) -> list[str]:
    """What was done to the source's bytes, in order."""
    if facts["format"] == "plain":
        return ["copied"]
    recoded, rounded = facts.get("recoded_blocks", 0), facts.get("rounded_blocks", 0)
    if rounded or not facts["exact"]:
        steps = [f"{rounded or 'all'} blocks rounded to NVFP4"]
    else:
        steps = ["codes carried as they are" + (f" but in {recoded} blocks" if recoded else "")]
    if recoded:
        steps.append(f"{recoded} blocks given other codes of equal values")
    if interleave := facts["parameters"].get("interleave"):
        steps.append(f"rows of gate and up alternate by {interleave}")
    if (slabs := facts["parameters"].get("slabs", 1)) > 1:
        steps.append(f"cut along K into {slabs} slabs")
    if facts["format"] == "nvfp4":
        steps.append("scales tiled 128 x 4")
    return steps


def _first_block(stored: Stored) -> dict[str, Any]:
    """The first block of row 0 in the source's order: codes, their scale, and their values."""
    if isinstance(stored, NVFP4Tensor):
        codes = unpack_nibbles(stored.codes.reshape(-1)[: NVFP4_BLOCK // 2])
        raw = stored.scales.reshape(-1)[:1]
        g = float(stored.global_scale)
        values = e2m1_decode(codes) * e4m3_decode(raw) * g
        return _block(codes, values) | {
            "scale_byte": int(raw),
            "scale": float(e4m3_decode(raw)),
            "global_scale": g,
        }
    if isinstance(stored, Fp8Matrix):
        codes, scales = unpack_fp8(stored)
        row = codes[0, : min(FP8_BLOCK, _SHOWN)]
        scale = float(scales.reshape(-1)[0].to(torch.float32))
        return _block(row.view(torch.uint8), row.to(torch.float32) * scale) | {"scale": scale}
    head = stored.reshape(-1)[:_SHOWN]
    return {"values": head.tolist()}


def _block(codes: Tensor, values: Tensor) -> dict[str, Any]:
    return {"codes": codes.tolist(), "values": values.tolist()}


def _first_bytes(packed: PackedCheckpoint, facts: dict[str, Any]) -> dict[str, Any]:
    """Where the tensor's weights begin in the store, and the bytes that lie there.

    Of a stack it is its expert's first file and offset: the first row of the first projection.
    """
    store, path = packed.store, facts["path"]
    members = [f"{path}/{m}" for m in ("codes", "weight")]
    array = store.array(next((m for m in members if m in store.hierarchy.arrays), path))
    expert = facts.get("expert", 0)
    per_file = array.spec.shard[0] if array.spec.shape else 1
    row_nbytes = array.spec.nbytes // (array.spec.shape[0] if array.spec.shape else 1)
    number = expert // per_file
    file = array.files[number]
    begin = (expert - number * per_file) * row_nbytes if "expert" in facts else 0
    begin += _projection_offset(packed, facts, row_nbytes)
    raw = store.map_file(file).view(begin, min(begin + _SHOWN // 2, file.payload_nbytes))
    return {"file": file.key, "offset": begin, "bytes": raw.numpy().tobytes().hex(" ")}


def _projection_offset(packed: PackedCheckpoint, facts: dict[str, Any], expert_nbytes: int) -> int:
    """Bytes from the start of an expert's codes to row 0 of this projection."""
    group = packed.store.contents.stacks.get(facts["path"])
    if group is None or len(group.names) == 1:
        return 0
    expert = str(facts["expert"])
    projection = [name.replace("{e}", expert) for name in group.names].index(facts["name"])
    first_row = projection * (group.interleave or group.rows)
    return first_row * (expert_nbytes // group.packed_rows // group.slabs)
