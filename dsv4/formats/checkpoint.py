"""What `dsv4.open` returns: a packed store seen as the checkpoint it was made from.

Names are the hub's and logical: every expert has its own, block scales belong to their matrix.
Values are computed from the emitted bytes through the inverse of the layout they are stored in.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.config import ModelConfig
from dsv4.formats.errors import StoreError
from dsv4.formats.layouts import deinterleave_rows, dequantize, unpack_fp8, unpack_nvfp4
from dsv4.formats.matrices import FP8_BLOCK, Fp8Matrix, Nvfp4Matrix
from dsv4.formats.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.store.contents import QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.schema import ATTRIBUTE, PLAIN_LAYOUT

Stored = NVFP4Tensor | Fp8Matrix | Tensor
"""A logical tensor as it is stored, its layout undone."""

SUGGESTIONS = 3
_E4M3_MAGNITUDE = 0x7F
_E4M3_SUBNORMAL_MAX = 7  # magnitudes 1..7 have a zero exponent


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a logical tensor lives: a plain array, or one projection (of one expert) of a group."""

    path: str
    group: QuantizedGroup | None = None
    projection: int = 0
    expert: int | None = None


class PackedCheckpoint:
    """A packed checkpoint. store: the `PackedStore` below it."""

    def __init__(self, store: PackedStore) -> None:
        self.store = store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PackedCheckpoint:
        """Open the store in `path`: checks its structure, maps nothing yet. Raises StoreError."""
        return cls(PackedStore.open(path))

    @property
    def config(self) -> ModelConfig:
        """The model configuration."""
        return self.store.config

    def names(self) -> list[str]:
        """Logical tensor names, hub naming, in order of layer and expert numbers."""
        return list(self._places)

    def format_of(self, name: str) -> str:
        """How `name` is stored: "nvfp4", "fp8" or "plain". Raises StoreError when unknown."""
        place = self._place(name)
        return place.group.format if place.group else "plain"

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape of `name`, `[out, in]` for a matrix. Raises StoreError when unknown."""
        place = self._place(name)
        if place.group is None:
            return self.store.array(place.path).spec.shape
        return (place.group.rows, place.group.cols)

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of `name` in the source's orientation, `[out, in]` for a matrix.

        A new tensor of `dtype`; integer tables (`tid2eid`) keep int64. Raises StoreError for an
        unknown name (with the nearest ones) and for bytes that do not match their checksum.
        """
        stored = self.stored(name)
        if isinstance(stored, Tensor):
            return stored.to(dtype, copy=True) if stored.is_floating_point() else stored.clone()
        if isinstance(stored, Fp8Matrix):
            return dequantize(stored).to(dtype)
        return dequantize_nvfp4(stored).to(dtype)

    def stored(self, name: str) -> Stored:
        """`name` alone, rows and columns in the source's order, in the format it is stored in.

        May share memory with the mapped files. Raises as `dequantize`.
        """
        place = self._place(name)
        if place.group is None:
            return self.store.tensor(name)
        if place.expert is None:
            matrix = self.store.matrix(name)
        else:
            matrix = self.store.stack(place.group).matrix(place.expert)
        if isinstance(matrix, Nvfp4Matrix):
            return unpack_nvfp4(matrix)[place.projection]
        if len(place.group.names) == 1:
            return matrix
        if isinstance(matrix, Tensor):
            return deinterleave_rows(matrix, place.group.interleave)[place.projection]
        return _fp8_rows(matrix, place.group.rows, place.projection)

    def provenance(self, name: str) -> dict[str, Any]:
        """Where `name` came from and what became of it.

        Always: `name`, `path`, `format`, `layout`, `shape`, `exact`. `sources`: role (weight,
        scale) -> `{"file", "begin", "end"}`, bytes of a file of the source. For quantised ones:
        `parameters` and `scales` (min, max, and for NVFP4 the counts of blocks, subnormal and zero
        scales and the global scale). For experts `recoded_blocks` and `rounded_blocks`. Further
        fields (such as `loss`) are the node's own attributes. Raises StoreError when unknown.
        """
        place = self._place(name)
        if place.group is None:
            own = self.store.array(place.path).spec.attributes[ATTRIBUTE]
            facts = _free_fields(own) | {"format": "plain", "layout": PLAIN_LAYOUT}
        else:
            own = place.group.attributes
            facts = (
                _free_fields(own)
                | {
                    "format": place.group.format,
                    "layout": own["layout"],
                    "parameters": dict(own["parameters"]),
                }
                | _scale_statistics(self.stored(name))
            )
        facts |= {"name": name, "path": place.path, "shape": list(self.shape(name))}
        facts["exact"] = own["exact"]
        if place.expert is not None:
            facts |= {"expert": place.expert} | self._lineage(place)
        else:
            facts["sources"] = self._sources(own.get("sources", {}), place.projection)
        return facts

    @functools.cached_property
    def _places(self) -> Mapping[str, _Place]:
        contents = self.store.contents
        places = {name: _Place(path) for name, path in contents.plain.items()}
        for name, group in contents.matrices.items():
            places[name] = _Place(group.path, group, group.names.index(name))
        for name, stack, expert, projection in contents.expert_names():
            if name in places:
                raise StoreError(f"{self.store.root}: tensor {name} is stored twice")
            places[name] = _Place(stack.path, stack, projection, expert)
        return dict(sorted(places.items(), key=lambda item: _natural(item[0])))

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            near = difflib.get_close_matches(str(name), self._places, n=SUGGESTIONS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise StoreError(f"{self.store.root}: there is no tensor {name!r}{hint}")
        return place

    def _lineage(self, place: _Place) -> dict[str, Any]:
        """Sources and block counts of one expert's projection; empty without the lineage array."""
        path = f"{place.path}/lineage"
        if path not in self.store.hierarchy.arrays:
            return {"sources": {}}
        row = self.store.array(path).row(place.expert or 0)
        columns = row.reshape(-1, row.shape[-1])[place.projection].tolist()
        sources = {"weight": columns[0:3], "scale": columns[3:6]}
        recoded, rounded = columns[6:8]
        return {
            "sources": self._sources({k: v for k, v in sources.items() if v[0] >= 0}, 0),
            "recoded_blocks": recoded,
            "rounded_blocks": rounded,
            "exact": rounded == 0,
        }

    def _sources(self, sources: Any, projection: int) -> dict[str, dict[str, Any]]:
        """`{role: [file index, begin, end]}` -> with the file's name; a list has one per name."""
        if isinstance(sources, list) and projection < len(sources):
            sources = sources[projection]
        source_files = self.store.manifest["source"].get("files", [])
        try:
            return {
                role: _source_range(source_files, file, begin, end)
                for role, (file, begin, end) in sources.items()
            }
        except (AttributeError, LookupError, TypeError, ValueError):
            raise StoreError(
                f"{self.store.root}: sources {sources!r} do not fit the manifest's source files"
            ) from None


def _fp8_rows(matrix: Fp8Matrix, rows: int, projection: int) -> Fp8Matrix:
    """Rows of one of several projections that follow each other; `rows` is whole scale tiles."""
    tiles = rows // FP8_BLOCK
    return Fp8Matrix(
        matrix.codes[:, projection * rows : (projection + 1) * rows],
        matrix.scales[projection * tiles : (projection + 1) * tiles],
        rows,
        matrix.cols,
    )


def _scale_statistics(stored: Stored) -> dict[str, dict[str, Any]]:
    """`{"scales": statistics}` of a quantised tensor; nothing of an unquantised one."""
    if isinstance(stored, Tensor):
        return {}
    if isinstance(stored, Fp8Matrix):
        values = unpack_fp8(stored)[1].to(torch.float32)
        return {"scales": {"min": float(values.min()), "max": float(values.max())}}
    scales = stored.scales
    values = scales.view(torch.float8_e4m3fn).to(torch.float32)
    magnitude = scales & _E4M3_MAGNITUDE
    subnormal = (magnitude > 0) & (magnitude <= _E4M3_SUBNORMAL_MAX)
    return {
        "scales": {
            "min": float(values.min()),
            "max": float(values.max()),
            "blocks": scales.numel(),
            "subnormal": int(subnormal.sum()),
            "zero": int((magnitude == 0).sum()),
            "global": float(stored.global_scale),
        }
    }


def _source_range(files: list[Any], index: int, begin: int, end: int) -> dict[str, Any]:
    """Raises ValueError for a range that is not inside the file, LookupError without the file."""
    file = files[index]
    if index < 0 or not 0 <= begin <= end <= file.get("bytes", end):
        raise ValueError
    return {"file": file["name"], "begin": begin, "end": end}


def _free_fields(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if key not in ("names", "sources")}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
