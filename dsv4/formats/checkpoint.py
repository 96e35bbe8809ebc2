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

from dsv4.formats.errors import StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import deinterleave_rows, dequantize, unpack_fp8, unpack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import FP8_BLOCK, SF_ROWS, Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.formats.plain_text import natural_key
from dsv4.formats.store.nodes import QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ATTRIBUTE, PLAIN_LAYOUT

Stored = NVFP4Tensor | Fp8Matrix | Tensor
"""A logical tensor as it is stored, its layout undone."""

SUGGESTIONS = 3
_OF_A_NODE = ("names", "sources", "inexact", "zero")  # not of one tensor alone
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

    def __repr__(self) -> str:
        manifest = self.store.manifest
        size = sum(file.nbytes for file in self.store.files_under(None))
        left = "".join(f", without {part}" for part in getattr(self.store.absent, "parts", ()))
        return (
            f"<PackedCheckpoint {self.store.root}: {self.name}, recipe "
            f"{manifest['recipe']['name']}, {size / 1e9:.2f} GB{left}, "
            f"root {manifest['root'][:12]}>"
        )

    @property
    def name(self) -> str:
        """What to call the model: its repository on the hub, else the store's directory."""
        return str(self.store.manifest["source"].get("repo") or self.store.root.resolve().name)

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

    def nbytes(self, name: str) -> int:
        """Bytes of `name` in the store, scales and padding included. Raises as `shape`."""
        place = self._place(name)
        if place.group is None:
            return self.store.array(place.path).spec.nbytes
        arrays = (
            self.store.hierarchy.arrays.get(f"{place.group.path}/{member}")
            for member in (place.group.weights, "scales", "global_scale")
        )
        whole = sum(spec.nbytes for spec in arrays if spec is not None)
        return whole // ((place.group.experts or 1) * len(place.group.names))

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of `name` in the source's orientation, `[out, in]` for a matrix.

        A new tensor of `dtype`; integer tables (`tid2eid`) keep int64. Raises StoreError for an
        unknown name (with the nearest ones) and for bytes that do not match their checksum.
        """
        stored = self.stored(name)
        if isinstance(stored, Tensor):
            return stored.to(dtype, copy=True) if stored.is_floating_point() else stored.clone()
        return values_of(stored).to(dtype)

    def stored(self, name: str) -> Stored:
        """`name` alone, rows and columns in the source's order, in the format it is stored in.

        May share memory with the mapped files. Raises as `dequantize`.
        """
        place = self._place(name)
        return _one_projection(self._matrix(name, place), place)

    def stored_rows(self, name: str, start: int, stop: int) -> Stored:
        """Rows `[start, stop)` of `stored(name)`, at the cost of these rows alone.

        `start` is a multiple of 128, as is `stop` unless it is the last row. Raises as `stored`.
        """
        place = self._place(name)
        return _rows(self._matrix(name, place), place, start, stop)

    def provenance(self, name: str, *, statistics: bool = True) -> dict[str, Any]:
        """Where `name` came from and what became of it.

        Always: `name`, `path`, `format`, `layout`, `shape`, `exact`. `sources`: role (weight,
        scale) -> `{"file", "begin", "end"}`, bytes of a file of the source. For quantised ones:
        `parameters` and `scales` (min, max, and for NVFP4 the counts of blocks, subnormal and zero
        scales and the global scale). For experts `recoded_blocks` and `rounded_blocks`. Further
        fields (such as `loss`) are the node's own attributes. Without `statistics` there is no
        `scales`, and no weight is read. Raises StoreError when unknown.
        """
        place = self._place(name)
        if place.group is None:
            own = self.store.array(place.path).spec.attributes[ATTRIBUTE]
            facts = _free_fields(own) | {"format": "plain", "layout": PLAIN_LAYOUT}
        else:
            own = place.group.attributes
            facts = _free_fields(own) | {
                "format": place.group.format,
                "layout": own["layout"],
                "parameters": dict(own["parameters"]),
            }
            facts |= _scale_statistics(self.stored(name)) if statistics else {}
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
        return dict(sorted(places.items(), key=lambda item: natural_key(item[0])))

    def _place(self, name: str) -> _Place:
        place = self._places.get(name)
        if place is None:
            if self.store.absent is not None and self.store.lacks(str(name)):
                raise StoreError(
                    f"{name} is not here: {self.store.absent.sentence(self.store.root)}"
                )
            near = difflib.get_close_matches(str(name), self._places, n=SUGGESTIONS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise StoreError(f"{self.store.root}: there is no tensor {name!r}{hint}")
        return place

    def _matrix(self, name: str, place: _Place) -> Matrix:
        if place.group is None:
            return self.store.tensor(name)
        if place.expert is None:
            return self.store.matrix(name)
        return self.store.stack(place.group).matrix(place.expert)

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


def values_of(stored: Stored) -> Tensor:
    """The values of what `PackedCheckpoint.stored` gives, float32."""
    if isinstance(stored, NVFP4Tensor):
        return dequantize_nvfp4(stored)
    return dequantize(stored)


def _one_projection(matrix: Matrix, place: _Place) -> Stored:
    """One projection of a matrix, or of its rows that `_rows` took, its layout undone."""
    if isinstance(matrix, Nvfp4Matrix):
        return unpack_nvfp4(matrix)[place.projection]
    group = place.group
    if group is None or len(group.names) == 1:
        return matrix
    if isinstance(matrix, Tensor):
        return deinterleave_rows(matrix, group.interleave)[place.projection]
    rows = matrix.rows // len(group.names)
    return _fp8_rows(matrix, place.projection * rows, (place.projection + 1) * rows)


def _rows(matrix: Matrix, place: _Place, start: int, stop: int) -> Stored:
    """Rows of one projection of a matrix, the layout of nothing else undone."""
    count = 1 if place.group is None else len(place.group.names)
    if isinstance(matrix, Fp8Matrix):
        first = place.projection * (matrix.rows // count)
        return _fp8_rows(matrix, first + start, first + stop)
    span = slice(start * count, stop * count)
    if isinstance(matrix, Tensor):
        return _one_projection(matrix[span], place)
    tiles = slice(span.start // SF_ROWS, -(-span.stop // SF_ROWS))
    cut = dataclasses.replace(
        matrix,
        codes=matrix.codes[:, span],
        scales=matrix.scales[:, tiles],
        rows=span.stop - span.start,
    )
    return _one_projection(cut, place)


def _fp8_rows(matrix: Fp8Matrix, start: int, stop: int) -> Fp8Matrix:
    """Rows from `start` on, which is a multiple of a scale tile's."""
    tiles = slice(start // FP8_BLOCK, -(-stop // FP8_BLOCK))
    return Fp8Matrix(matrix.codes[:, start:stop], matrix.scales[tiles], stop - start, matrix.cols)


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
    return {key: value for key, value in own.items() if key not in _OF_A_NODE}
