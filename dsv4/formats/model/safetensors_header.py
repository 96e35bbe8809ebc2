"""The header of a safetensors file, read strictly: what it names, and where the bytes lie.

Layout: u64 little-endian `N`, then `N` bytes of JSON `{name: {dtype, shape, data_offsets}}` padded
with spaces, then the data, which the tensors cover exactly once without gaps. Offsets are chosen by
whoever made the file and end up as read positions, so every one is checked here, once. Stricter
than the safetensors library, which accepts duplicate names (the last one wins) and any name at all.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from dsv4.formats.errors import SourceError
from dsv4.formats.file_kinds import HEAD_BYTES, misfit
from dsv4.formats.strict_json import DuplicateKeyError, parse_strict

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_RANK = 8
MAX_TENSOR_BITS = 1 << 62
# transformers 5.8.1 writes `mlp.experts..3.w1.weight`.
TENSOR_NAME = re.compile(r"[A-Za-z0-9_]+(?:(?:\.|(?<=\.experts)\.\.)[A-Za-z0-9_]+)*")
MAX_NAME_LENGTH = 256
METADATA_KEY = "__metadata__"
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes `[begin, end)` of `file`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes the tensor occupies in the file."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the file at `path`, by name, in file order.

    Raises SourceError, naming the file and the tensor, when anything is malformed.
    """
    with path.open("rb") as file:
        file_size = path.stat().st_size
        head = file.read(HEAD_BYTES)
        rest = LENGTH_BYTES + header_length(head, file_size, path.name) - len(head)
        return parse_header(head + file.read(max(rest, 0)), file_size, path.name)


def header_length(prefix: bytes, file_size: int, file_name: str) -> int:
    """Bytes of JSON that follow the first eight bytes of a file of `file_size` bytes.

    prefix: these eight bytes, or more, by which an error says what the file is instead.
    Raises SourceError when the file is too short, or the length is beyond the file or the limit.
    """
    if problem := misfit(file_name, prefix):
        raise SourceError(problem)
    if file_size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        _refuse(
            file_name,
            f"is {min(file_size, len(prefix))} bytes long, too short for a safetensors file; "
            "download it again",
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length < 2 or length > MAX_HEADER_BYTES:
        _refuse(
            file_name,
            f"declares a header of {length} bytes, expected 2 to {MAX_HEADER_BYTES}; "
            "this is not a safetensors file",
        )
    if LENGTH_BYTES + length > file_size:
        _refuse(
            file_name,
            f"is truncated: it is {file_size} bytes long and its header alone needs "
            f"{LENGTH_BYTES + length}; download it again",
        )
    return length


def parse_header(raw: bytes, file_size: int, file_name: str) -> dict[str, TensorEntry]:
    """The tensors of a file, by name, in file order.

    raw: the file's first bytes, at least the whole header; more is ignored.
    file_size: bytes of the whole file. file_name: its basename, for entries and errors.
    Raises SourceError, naming the file and the tensor, when anything is malformed.
    """
    length = header_length(raw, file_size, file_name)
    text = raw[LENGTH_BYTES : LENGTH_BYTES + length]
    if len(text) < length:
        _refuse(file_name, f"header ends after {len(text)} of {length} bytes; download it again")
    header = _parse_json(text, file_name)
    _check_metadata(header.pop(METADATA_KEY, {}), file_name)
    data_start = LENGTH_BYTES + length
    entries = [_parse_entry(name, raw, data_start, file_name) for name, raw in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_coverage(entries, data_start, file_size, file_name)
    return {entry.name: entry for entry in entries}


def _refuse(file_name: str, problem: str) -> NoReturn:
    raise SourceError(f"{file_name} {problem}")


def _refuse_tensor(file_name: str, name: str, problem: str) -> NoReturn:
    raise SourceError(f"{file_name}: tensor {name[:MAX_NAME_LENGTH]!r} {problem}")


def _parse_json(text: bytes, file_name: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse(file_name, "header does not begin with '{'; this is not a safetensors file")
    try:
        header: dict[str, Any] = parse_strict(text)
    except DuplicateKeyError as error:
        problem = f"header has {error} twice; it is ambiguous"
    except ValueError as error:
        problem = f"header is not valid JSON: {error}"
    else:
        return header
    _refuse(file_name, problem)


def _check_metadata(metadata: object, file_name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(file_name, f"header has a {METADATA_KEY} that is no map from text to text")


def _parse_entry(name: str, raw: object, data_start: int, file_name: str) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH or not TENSOR_NAME.fullmatch(name):
        _refuse_tensor(
            file_name,
            name,
            f"has a name that is not 1 to {MAX_NAME_LENGTH} letters, digits, '_' and "
            "non-empty parts between '.'",
        )
    if not isinstance(raw, dict) or set(raw) != ENTRY_FIELDS:
        found = str(sorted(raw)) if isinstance(raw, dict) else type(raw).__name__
        expected = sorted(ENTRY_FIELDS)
        _refuse_tensor(file_name, name, f"has {found:.200}, expected the fields {expected}")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse_tensor(file_name, name, f"has the unknown dtype {dtype!r:.80}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        _refuse_tensor(
            file_name,
            name,
            f"has the shape {shape!r:.80}, expected at most {MAX_RANK} non-negative integers",
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse_tensor(
            file_name,
            name,
            f"has the data_offsets {offsets!r:.80}, expected [begin, end] with 0 <= begin <= end",
        )
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits > MAX_TENSOR_BITS or max(shape, default=0) > MAX_TENSOR_BITS:
        _refuse_tensor(file_name, name, f"of shape {shape} overflows any file")
    if bits != (end - begin) * 8:
        size = f"{bits} bits" if bits % 8 else f"{bits // 8}"
        _refuse_tensor(
            file_name, name, f"spans {end - begin} bytes, expected {size} for {dtype} {shape}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end, file_name)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(
    entries: list[TensorEntry], data_start: int, file_size: int, file_name: str
) -> None:
    """The data is covered exactly once: no overlap, no hole, no end beyond the file, no rest."""
    position = data_start
    for entry in entries:
        if entry.end > file_size:
            _refuse_tensor(
                file_name,
                entry.name,
                f"ends at byte {entry.end} of a file of {file_size} bytes; the file is truncated, "
                "download it again",
            )
        if entry.begin < position:
            _refuse_tensor(
                file_name,
                entry.name,
                f"begins at byte {entry.begin} inside the tensor before it, which ends at "
                f"{position}",
            )
        if entry.begin > position:
            _refuse_tensor(
                file_name,
                entry.name,
                f"begins at byte {entry.begin} after a hole of {entry.begin - position} bytes",
            )
        position = entry.end
    if position != file_size:
        _refuse(file_name, f"has {file_size - position} bytes that belong to no tensor")
