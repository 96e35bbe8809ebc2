"""What the nodes of a store mean: plain tensors, quantised matrices, stacks of experts.

A *plain tensor* is an array whose `dsv4` attribute has `"format": "plain"` and its hub name in
`names`. A *quantised matrix* is a group with the arrays `codes`, `scales` and, for NVFP4,
`global_scale`:

    {"format": "nvfp4" | "fp8", "layout": id, "parameters": {"slabs": S, "interleave": G},
     "shape": [N, K], "names": [hub name per projection], "exact": bool, …provenance}

`shape` is one projection's; two names (gate, up) have interleaved rows, so the codes have 2N.
A *stack* holds E such matrices under a leading dimension, and names its experts by the template
`layers.2.ffn.experts.{e}.w1.weight`. It may have an int64 array `lineage` `[E, P, 8]`. Two
projections of FP8 follow each other whole (interleave 0), since a scale covers 128 rows. A stack
may also be unquantised (`"format": "plain"`): one array `weight` instead of codes and scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsv4.formats.errors import StoreError
from dsv4.formats.model.inventory import DraftKind, detect_draft
from dsv4.formats.numeric.operands import FP8_BLOCK, NVFP4_K_ALIGN, SF_ROWS, SF_TILE_BYTES
from dsv4.formats.store.specs import (
    ATTRIBUTE,
    LAYOUT_OF,
    MAX_ARRAY_BYTES,
    ArraySpec,
    path_of,
)
from dsv4.formats.store.zarr_json import Hierarchy

EXPERT = "{e}"
LINEAGE_COLUMNS = 8
_FP8_SCALES = ("e8m0", "float32", "bfloat16")
_FLOATS = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class QuantizedGroup:
    """A quantised matrix, or a stack of `experts` of them (which may be unquantised).

    rows, cols: logical shape of one projection. names: one per projection, templates in a stack.
    attributes: the group's whole `dsv4` attribute, with the free provenance fields.
    """

    path: str
    format: str
    slabs: int
    interleave: int
    rows: int
    cols: int
    names: tuple[str, ...]
    experts: int | None
    attributes: Mapping[str, Any]

    @property
    def packed_rows(self) -> int:
        """Rows of the codes: those of all projections."""
        return self.rows * len(self.names)

    @property
    def packed_cols(self) -> int:
        """Columns of the codes, with the padding of NVFP4."""
        padded = _up(self.cols, NVFP4_K_ALIGN) * NVFP4_K_ALIGN
        return padded if self.format == "nvfp4" else self.cols

    @property
    def weights(self) -> str:
        """The member array that holds the weights themselves."""
        return "weight" if self.format == "plain" else "codes"


@dataclasses.dataclass(frozen=True)
class Contents:
    """All tensors of a store, found once when it is opened.

    plain: hub name -> array path. matrices: hub name -> group. stacks: path -> group.
    """

    plain: Mapping[str, str]
    matrices: Mapping[str, QuantizedGroup]
    stacks: Mapping[str, QuantizedGroup]

    @property
    def draft(self) -> DraftKind:
        """Which draft layers are stored."""
        return detect_draft((*self.plain, *self.matrices))[0]

    def expert_names(self) -> Iterator[tuple[str, QuantizedGroup, int, int]]:
        """(hub name, stack, expert, projection) of every matrix in a stack."""
        for stack in self.stacks.values():
            for expert in range(stack.experts or 0):
                for projection, template in enumerate(stack.names):
                    yield template.replace(EXPERT, str(expert)), stack, expert, projection


def read_contents(hierarchy: Hierarchy) -> Contents:
    """Interpret every node. Raises StoreError when attributes and arrays contradict each other."""
    plain: dict[str, str] = {}
    matrices: dict[str, QuantizedGroup] = {}
    stacks: dict[str, QuantizedGroup] = {}
    members: set[str] = set()
    for path, attributes in hierarchy.groups.items():
        if not attributes:
            continue
        group = _read_group(path, attributes.get(ATTRIBUTE), hierarchy.arrays)
        members.update(_check_members(group, hierarchy.arrays))
        if group.experts is not None:
            stacks[path] = group
            continue
        for name in group.names:
            _claim(name, path, plain, matrices)
            matrices[name] = group
    for path, spec in hierarchy.arrays.items():
        if path not in members:
            name = _plain_name(spec)
            _claim(name, path, plain, matrices)
            plain[name] = path
    templates = [name for stack in stacks.values() for name in stack.names]
    if len(set(templates)) != len(templates):
        raise StoreError("two stacks claim the same expert names")
    return Contents(plain, matrices, stacks)


def _claim(name: str, path: str, *taken: Mapping[str, Any]) -> None:
    if any(name in names for names in taken):
        raise StoreError(f"node {path}: tensor {name} is stored twice")


def _plain_name(spec: ArraySpec) -> str:
    own = spec.attributes[ATTRIBUTE]
    names = own.get("names")
    if own.get("format") != "plain" or not isinstance(names, list) or len(names) != 1:
        raise StoreError(
            f"array {spec.path} is neither part of a quantised matrix nor a plain tensor with "
            "one name"
        )
    if not isinstance(own.get("exact"), bool):
        raise StoreError(f"array {spec.path}: exact is {own.get('exact')!r}, expected a bool")
    path_of(names[0], StoreError)
    return str(names[0])


def _read_group(path: str, own: Any, arrays: Mapping[str, ArraySpec]) -> QuantizedGroup:
    codes = arrays.get(f"{path}/codes", arrays.get(f"{path}/weight"))
    if not isinstance(own, dict) or codes is None:
        raise StoreError(f"group {path} has attributes, but is no quantised matrix with codes")
    kind, layout = own.get("format"), own.get("layout")
    if not isinstance(kind, str) or kind not in LAYOUT_OF or layout != LAYOUT_OF[kind]:
        raise StoreError(
            f"group {path}: format {kind!r} with layout {layout!r} is unknown, expected one of "
            f"{LAYOUT_OF}"
        )
    parameters = own.get("parameters")
    if not isinstance(parameters, dict) or parameters.keys() - {"slabs", "interleave"}:
        raise StoreError(f"group {path}: parameters are {parameters!r}, expected slabs, interleave")
    slabs, interleave = parameters.get("slabs"), parameters.get("interleave", 0)
    shape = own.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        raise StoreError(f"group {path}: shape is {shape!r}, expected [N, K]")
    for what, value, least in (
        ("slabs", slabs, 1),
        ("interleave", interleave, 0),
        ("shape[0]", shape[0], 1),
        ("shape[1]", shape[1], 1),
    ):
        if type(value) is not int or not least <= value <= MAX_ARRAY_BYTES:
            raise StoreError(f"group {path}: {what} is {value!r}, expected an integer >= {least}")
    if not isinstance(own.get("exact"), bool):
        raise StoreError(f"group {path}: exact is {own.get('exact')!r}, expected a bool")
    experts = codes.shape[0] if len(codes.shape) == 3 else None
    if kind == "plain" and experts is None:
        raise StoreError(f"group {path}: an unquantised matrix is an array, not a group")
    names = _read_names(path, own.get("names"), experts is not None)
    return QuantizedGroup(
        path, kind, slabs or 0, interleave, shape[0], shape[1], names, experts, own
    )


def _read_names(path: str, names: Any, stacked: bool) -> tuple[str, ...]:
    if not isinstance(names, list) or not 1 <= len(names) <= 2:
        raise StoreError(f"group {path}: names are {names!r}, expected one or two hub names")
    for name in names:
        if not isinstance(name, str) or (stacked and name.split(".").count(EXPERT) != 1):
            raise StoreError(
                f"group {path}: name {name!r} of a stack, expected one component {EXPERT!r}"
            )
        path_of(name.replace(EXPERT, "0") if stacked else name, StoreError)
    return tuple(names)


def _check_members(group: QuantizedGroup, arrays: Mapping[str, ArraySpec]) -> list[str]:
    """-> paths of the group's arrays, each checked against what the attributes promise."""
    expected = _EXPECTED[group.format](group)
    if group.experts is not None:
        expected["lineage"] = ((group.experts, len(group.names), LINEAGE_COLUMNS), ("int64",))
    present = []
    for member, (shape, elements) in expected.items():
        spec = arrays.get(f"{group.path}/{member}")
        if spec is None and member == "lineage":
            continue
        if spec is None:
            raise StoreError(f"group {group.path}: array {member} is missing")
        if spec.shape != shape or spec.element not in elements:
            raise StoreError(
                f"array {spec.path} is {spec.element} {spec.shape}, expected "
                f"{' or '.join(elements)} {shape}"
            )
        present.append(spec.path)
    _check_slabs(group, arrays)
    return present


_Arrays = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]


def _check_interleave(group: QuantizedGroup) -> None:
    projections = len(group.names)
    if (projections == 2) != (group.interleave > 0):
        raise StoreError(
            f"group {group.path}: interleave {group.interleave} with {projections} names; rows "
            "interleave exactly when there are two"
        )
    if group.interleave and group.rows % group.interleave:
        raise StoreError(
            f"group {group.path}: {group.rows} rows do not divide into runs of {group.interleave}"
        )


def _nvfp4_arrays(group: QuantizedGroup) -> _Arrays:
    projections, cols = len(group.names), group.packed_cols
    _check_interleave(group)
    if group.slabs > 1 and group.cols % (group.slabs * NVFP4_K_ALIGN):
        raise StoreError(
            f"group {group.path}: {group.cols} columns do not divide into {group.slabs} slabs of "
            f"a multiple of {NVFP4_K_ALIGN}"
        )
    lead = () if group.experts is None else (group.experts,)
    tiles = (_up(group.packed_rows, SF_ROWS), cols // NVFP4_K_ALIGN, SF_TILE_BYTES)
    return {
        "codes": ((*lead, group.packed_rows, cols // 2), ("e2m1x2",)),
        "scales": ((*lead, *tiles), ("e4m3",)),
        "global_scale": ((*lead, projections), ("float32",)),
    }


def _fp8_arrays(group: QuantizedGroup) -> _Arrays:
    stacked = group.experts is not None
    if group.interleave or (len(group.names) == 2 and (not stacked or group.rows % FP8_BLOCK)):
        raise StoreError(
            f"group {group.path}: an FP8 matrix has one name and no interleave; two of a stack "
            f"follow each other in multiples of {FP8_BLOCK} rows"
        )
    if group.cols % group.slabs:
        raise StoreError(
            f"group {group.path}: {group.cols} columns do not divide into {group.slabs} slabs"
        )
    lead = () if group.experts is None else (group.experts,)
    tiles = (_up(group.packed_rows, FP8_BLOCK), _up(group.cols, FP8_BLOCK))
    codes = (*lead, group.packed_rows, group.cols)
    return {"codes": (codes, ("e4m3",)), "scales": ((*lead, *tiles), _FP8_SCALES)}


def _plain_arrays(group: QuantizedGroup) -> _Arrays:
    _check_interleave(group)
    return {"weight": ((group.experts or 0, group.packed_rows, group.cols), _FLOATS)}


_EXPECTED = {"nvfp4": _nvfp4_arrays, "fp8": _fp8_arrays, "plain": _plain_arrays}


def _check_slabs(group: QuantizedGroup, arrays: Mapping[str, ArraySpec]) -> None:
    """Columns are cut into exactly `slabs` chunks, and then nothing else of a matrix is."""
    lead = 0 if group.experts is None else 1
    for member in (group.weights, "scales"):
        if f"{group.path}/{member}" not in arrays:
            continue  # unquantised
        spec = arrays[f"{group.path}/{member}"]
        cuts = tuple(s // c for s, c in zip(spec.shape, spec.chunk, strict=True))
        slabs = group.slabs if member != "scales" or group.format == "nvfp4" else 1
        row_cuts, col_cuts, rest = cuts[lead], cuts[lead + 1], cuts[lead + 2 :]
        if col_cuts != slabs or any(cut != 1 for cut in rest):
            raise StoreError(
                f"array {spec.path}: chunk {spec.chunk} cuts {col_cuts} slabs of columns, "
                f"expected {slabs}"
            )
        if slabs > 1 and (spec.shard[lead:] != spec.shape[lead:] or row_cuts > 1):
            raise StoreError(
                f"array {spec.path}: chunk {spec.chunk} cuts rows and columns, expected one"
            )
        if lead and not spec.row_addressable:
            raise StoreError(f"array {spec.path}: chunk {spec.chunk} mixes parts of experts")


def _up(value: int, unit: int) -> int:
    return -(-value // unit)
