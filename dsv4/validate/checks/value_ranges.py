"""Byte values that no correct packer writes, as ranges of integers: what each array may hold.

A NaN or an infinity is a magnitude above the largest finite one, a negative number has its sign
bit set: in integers of the element's width both are a mask and a range, for every format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.store.nodes import QuantizedGroup
from dsv4.formats.store.specs import ArraySpec
from dsv4.validate.provenance import quantized_groups


@dataclasses.dataclass(frozen=True)
class Rule:
    """Elements, read as `dtype` and masked, lie in `[low, high]`; `what` is wrong otherwise."""

    what: str
    dtype: str
    mask: int
    low: int
    high: int

    def holds(self, piece: NDArray[np.uint8]) -> bool:
        """Whether it is true of all elements in `piece`, which are whole."""
        values = piece.view(self.dtype)
        masked = self.mask != -1
        if masked:
            values = values & np.array(self.mask, self.dtype)
        return bool(values.max() <= self.high and (masked or values.min() >= self.low))


@dataclasses.dataclass(frozen=True)
class Judge:
    """The rules of one array. owner: whom a finding names. tally: whether bytes are counted."""

    owner: str
    rules: tuple[Rule, ...] = ()
    tally: bool = False

    def broken_by(self, piece: NDArray[np.uint8]) -> set[str]:
        """What is wrong with `piece`, whole elements of the array."""
        return {rule.what for rule in self.rules if not rule.holds(piece)}


NO_JUDGE = Judge("")
_UNSIGNED = {
    "e4m3": ("u1", 0x7F, 0x7E),
    "bfloat16": ("<i2", 0x7FFF, 0x7F7F),
    "float32": ("<i4", 0x7FFFFFFF, 0x7F7FFFFF),
}
"""Element -> integer of its width, mask of the magnitude, magnitude of the largest finite value."""
_NEGATIVE = Rule("its block scales hold a negative value", "u1", 0x80, 0, 0)
_NO_TABLE = Rule("is no table of integers", "u1", -1, 1, 0)
_E8M0 = Rule("its scales hold E8M0 NaN", "u1", -1, 0, 0xFE)


def judges(packed: PackedCheckpoint) -> dict[str, Judge]:
    """Key of a file -> what its bytes have to obey, of every file whose array has rules."""
    store = packed.store
    arrays = store.hierarchy.arrays
    found: dict[str, Judge] = {}
    for group in quantized_groups(store):
        for member, rules in _group_rules(group, arrays):
            found[f"{group.path}/{member}"] = Judge(
                group.path, rules, tally=group.format == "nvfp4" and member == "scales"
            )
    for name, path in store.contents.plain.items():
        rules = _finite("holds NaN or infinity", arrays[path].element)
        if name.endswith(".tid2eid"):
            last = packed.config.n_routed_experts - 1
            table = Rule("names an expert that does not exist", "<i8", -1, 0, last)
            rules = (table if arrays[path].element == "int64" else _NO_TABLE,)
        found[path] = Judge(name, rules)
    return {file.key: judge for path, judge in found.items() for file in arrays[path].files()}


def _group_rules(
    group: QuantizedGroup, arrays: Mapping[str, ArraySpec]
) -> Iterator[tuple[str, tuple[Rule, ...]]]:
    """-> (member array, its rules). E2M1 codes have none: all sixteen are numbers."""
    if group.format == "plain":
        member = group.weights
        element = arrays[f"{group.path}/{member}"].element
        yield member, _finite("its weights hold NaN or infinity", element)
    elif group.format == "fp8":
        yield "codes", _finite("its codes hold E4M3 NaN", "e4m3")
        element = arrays[f"{group.path}/scales"].element
        positive = "its scales are not finite and positive"
        yield "scales", (_E8M0,) if element == "e8m0" else (_positive(positive, element),)
    else:
        yield "scales", (*_finite("its block scales hold NaN", "e4m3"), _NEGATIVE)
        element = arrays[f"{group.path}/global_scale"].element
        yield (
            "global_scale",
            (_positive("its global scales are not finite and positive", element),),
        )


def _finite(what: str, element: str) -> tuple[Rule, ...]:
    if element not in _UNSIGNED:
        return ()
    dtype, mask, largest = _UNSIGNED[element]
    return (Rule(what, dtype, mask, 0, largest),)


def _positive(what: str, element: str) -> Rule:
    dtype, _, largest = _UNSIGNED[element]
    return Rule(what, dtype, -1, 1, largest)
