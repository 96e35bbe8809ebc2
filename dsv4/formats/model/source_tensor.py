"""Logical source tensors: a weight together with the scales that give its bytes their meaning.

A checkpoint stores one logical tensor as one to four safetensors entries. What they are is decided
by the entries themselves (their roles and dtypes), never by what the config claims:

    MXFP4   weight I8 [N, K/2]         scale F8_E8M0 [N, K/32]
    NVFP4   weight U8 [N, K/2]         weight_scale F8_E4M3 [N, K/16]   weight_scale_2 F32
    NVFP4   weight_packed U8 [N, K/2]  weight_scale F8_E4M3 [N, K/16]   weight_global_scale F32
    FP8     weight F8_E4M3 [N, K]      scale | weight_scale | weight_scale_inv
    PLAIN   weight (or the tensor itself) BF16, F32 or integers

FP8 has one scale per 128x128 tile, `[N/128, K/128]`, one per row, `[N, 1]` or `[N]`, or one for the
matrix, `[]` or `[1]`. ModelOpt's `weight_scale_2` multiplies, compressed-tensors'
`weight_global_scale` divides. Scales of activations may stand beside quantised weights; weights do
not need them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from dsv4.formats.errors import SourceError
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.numeric.codecs import MXFP4_BLOCK
from dsv4.formats.numeric.operands import FP8_BLOCK, NVFP4_BLOCK

ITSELF = ""  # the role of an entry that is the whole tensor under its own name
INPUT_SCALES = ("input_scale", "input_global_scale")
FLOATS = ("BF16", "F32")
INTEGERS = ("I64", "I32", "I16", "I8", "U32", "U16", "U8")  # all of them fit I64


class Encoding(enum.StrEnum):
    """How the bytes of a logical tensor are read."""

    MXFP4 = "mxfp4"  # E2M1, one E8M0 scale per 32 columns
    NVFP4 = "nvfp4"  # E2M1, one E4M3 scale per 16 columns and a global scale
    FP8 = "fp8"  # E4M3, one scale per 128x128 tile, per row or per matrix
    PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One logical tensor: hub name, encoding, logical shape, and its entries in the files.

    reciprocal: the global scale divides instead of multiplying (compressed-tensors).
    ignored: entries that belong to it but are not carried (scales of activations).
    """

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    weight: TensorEntry
    scale: TensorEntry | None = None
    global_scale: TensorEntry | None = None
    reciprocal: bool = False
    ignored: tuple[TensorEntry, ...] = ()

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The entries that make its values, by role: weight, scale, global_scale."""
        roles = {"weight": self.weight, "scale": self.scale, "global_scale": self.global_scale}
        return {role: entry for role, entry in roles.items() if entry is not None}

    @property
    def tiled(self) -> bool:
        """Whether it is FP8 with one scale per 128x128 tile."""
        return (
            self.encoding is Encoding.FP8
            and self.scale is not None
            and (self.scale.shape == _fp8_tiles(self.shape))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the entries that make its values."""
        return sum(entry.nbytes for entry in self.entries.values())


@dataclasses.dataclass(frozen=True)
class _Form:
    """One way to store a tensor: which roles, in which dtypes. scales: any one of these roles."""

    encoding: Encoding
    weight: str
    dtypes: tuple[str, ...]
    scales: tuple[str, ...] = ()
    scale_dtypes: tuple[str, ...] = ()
    global_scale: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.weight or 'tensor'} {'/'.join(self.dtypes)}"]
        if self.scales:
            parts.append(f"{'/'.join(self.scales)} {'/'.join(self.scale_dtypes)}")
        if self.global_scale:
            parts.append(f"{self.global_scale} F32")
        return " + ".join(parts)


_E4M3, _E8M0 = "F8_E4M3", "F8_E8M0"
_FP8_SCALES = ("scale", "weight_scale", "weight_scale_inv")
_FORMS = (
    _Form(Encoding.MXFP4, "weight", ("I8",), ("scale",), (_E8M0,)),
    _Form(Encoding.NVFP4, "weight", ("U8",), ("weight_scale",), (_E4M3,), "weight_scale_2"),
    _Form(
        Encoding.NVFP4,
        "weight_packed",
        ("U8",),
        ("weight_scale",),
        (_E4M3,),
        "weight_global_scale",
    ),
    _Form(Encoding.FP8, "weight", (_E4M3,), _FP8_SCALES, (_E8M0, *FLOATS)),
    _Form(Encoding.PLAIN, "weight", FLOATS),
    _Form(Encoding.PLAIN, ITSELF, (*FLOATS, *INTEGERS)),
)
ROLES = frozenset(
    {role for form in _FORMS for role in (form.weight, *form.scales, form.global_scale) if role}
    | set(INPUT_SCALES)
)


def classify(name: str, members: Mapping[str, TensorEntry]) -> SourceTensor:
    """The tensor of hub name `name` that the entries `members` (by role) store.

    Raises SourceError when they store none: a role missing or too many, dtypes that have no
    meaning together, scales of another shape than the weight implies.
    """
    form = _form(name, members)
    rest = {role: entry for role, entry in members.items() if role != form.weight}
    ignored = tuple(rest.pop(role) for role in INPUT_SCALES if form.scales and role in rest)
    scales = [role for role in form.scales if role in rest]
    if form.scales and not scales:
        raise _refusal(name, members, f"expected {' or '.join(form.scales)} beside it", form)
    if len(scales) > 1:
        raise _refusal(name, members, f"expected one of {' and '.join(scales)}, not both", form)
    if form.global_scale is not None and form.global_scale not in rest:
        raise _refusal(name, members, f"expected {form.global_scale} beside it", form)
    scale = rest.pop(scales[0]) if scales else None
    global_scale = rest.pop(form.global_scale) if form.global_scale else None
    if rest:
        raise _refusal(name, members, f"{', '.join(sorted(rest))} has no meaning beside it", form)
    weight = members[form.weight]
    if scale is not None and scale.dtype not in form.scale_dtypes:
        raise _refusal(name, members, f"scales cannot be {scale.dtype}", form)
    tensor = SourceTensor(
        name,
        form.encoding,
        _logical_shape(form.encoding, weight),
        weight,
        scale,
        global_scale,
        form.global_scale == "weight_global_scale",
        ignored,
    )
    _check_scales(tensor)
    return tensor


def _form(name: str, members: Mapping[str, TensorEntry]) -> _Form:
    for form in _FORMS:
        if form.weight in members and members[form.weight].dtype in form.dtypes:
            return form
    roles = [role for role in ("weight", "weight_packed", ITSELF) if role in members]
    if not roles:
        raise _refusal(name, members, "its weight is missing")
    problem = "such a weight is not known"
    raise _refusal(name, members, problem, *(form for form in _FORMS if form.weight == roles[0]))


def _refusal(
    name: str, members: Mapping[str, TensorEntry], problem: str, *forms: _Form
) -> SourceError:
    """forms: what would have been right; any known form where none is given."""
    found = " + ".join(
        f"{role or 'tensor'} {entry.dtype} {list(entry.shape)}" for role, entry in members.items()
    )
    file = next(iter(members.values())).file
    expected = "; ".join(map(str, forms or _FORMS))
    return SourceError(f"{file}: {name} is stored as {found}; {problem} (expected {expected})")


def _logical_shape(encoding: Encoding, weight: TensorEntry) -> tuple[int, ...]:
    if encoding in (Encoding.MXFP4, Encoding.NVFP4) and weight.shape:
        return (*weight.shape[:-1], weight.shape[-1] * 2)
    return weight.shape


def _fp8_tiles(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def _check_scales(tensor: SourceTensor) -> None:
    """Scales have the shape that the weight's implies. Raises SourceError."""
    if tensor.scale is None:
        return
    if len(tensor.shape) != 2:
        raise SourceError(
            f"{tensor.weight.file}: {tensor.name} is {tensor.encoding} of shape "
            f"{list(tensor.shape)}, expected a matrix [out, in]"
        )
    rows, cols = tensor.shape
    block = {Encoding.MXFP4: MXFP4_BLOCK, Encoding.NVFP4: NVFP4_BLOCK}.get(tensor.encoding)
    others: tuple[tuple[int, ...], ...] = ()
    if block is None:
        expected = _fp8_tiles(tensor.shape)
        others = ((rows, 1), (rows,), (1,), ())
    elif cols % block:
        raise SourceError(
            f"{tensor.weight.file}: {tensor.name} has {cols} columns, expected a multiple of "
            f"{block} for {tensor.encoding} blocks"
        )
    else:
        expected = (rows, cols // block)
    if tensor.scale.shape not in (expected, *others):
        more = ", or one a row or one for the matrix" if others else ""
        raise SourceError(
            f"{tensor.scale.file}: {tensor.scale.name} has shape {list(tensor.scale.shape)}, "
            f"expected {list(expected)} for {tensor.encoding} of shape {list(tensor.shape)}{more}"
        )
    scale = tensor.global_scale
    if scale is not None and (scale.dtype != "F32" or scale.shape not in ((), (1,))):
        raise SourceError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected one F32"
        )
