"""Faults to plant in a store: raw ones from a seed, and a catalogue with all checksums made to fit.

Of each it is known what has to be named, which check sees it, and whether it can be seen without
the source.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from dsv4.formats.store.specs import MARKER, NODE_DOCUMENT
from tests.validate.scratch import Scratch

STRANGERS = ("extra.bin", "head/c/9", "assets/notes.txt", "norm/weight/c/0.partial")
KINDS = {
    "bit": 34,
    "byte": 12,
    "truncation": 10,
    "growth": 10,
    "deletion": 10,
    "zeroed block": 8,
    "swapped files": 6,
    "swapped chunks": 6,
    "stranger": len(STRANGERS),
}


@dataclasses.dataclass(frozen=True)
class Mutation:
    """named: text that a finding must hold. seen: whether it is found without the source."""

    name: str
    named: str
    plant: Callable[[Scratch], object]
    check: str | None = None
    seen: bool = True
    repairable: bool = False


def raw_faults(scratch: Scratch, seed: int) -> Iterator[Mutation]:
    """Faults of files, as disks and copies make them: nothing else is made to fit."""
    draw = random.Random(seed)
    for kind, count in KINDS.items():
        for number in range(count):
            yield _RAW[kind](scratch, draw, number)


def _pick(scratch: Scratch, draw: random.Random) -> str:
    """A file of any kind; of every kind about as often."""
    kind = draw.choice(("data", "data", "data", "assets/", NODE_DOCUMENT, "pin"))
    if kind == "pin":
        return draw.choice((NODE_DOCUMENT, MARKER))
    nodes = {key for key in scratch.keys if key.endswith(NODE_DOCUMENT)}
    assets = {key for key in scratch.keys if key.startswith("assets/")}
    choice = {"assets/": assets, NODE_DOCUMENT: nodes - {NODE_DOCUMENT}}
    return draw.choice(sorted(choice.get(kind, {*scratch.keys} - nodes - assets - {MARKER})))


def _fault(kind: str, key: str, change: Callable[[bytearray], bytes | None]) -> Mutation:
    def plant(scratch: Scratch) -> None:
        if (raw := change(scratch.read(key))) is None:
            scratch.remove(key)
        else:
            scratch.write(key, raw)

    return Mutation(f"{kind} of {key}", key, plant, repairable=key not in (NODE_DOCUMENT, MARKER))


def _bit(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    key = _pick(scratch, draw)
    at, bit = draw.randrange(len(scratch.read(key))), number % 8
    return _fault(f"bit {bit} of byte {at}", key, lambda raw: _xored(raw, at, 1 << bit))


def _byte(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    key = draw.choice([file.key for file in scratch.store.files_under(None)])
    at, mask = draw.randrange(len(scratch.read(key))), draw.randrange(1, 256)
    return _fault(f"byte {at}", key, lambda raw: _xored(raw, at, mask))


def _xored(raw: bytearray, at: int, mask: int) -> bytes:
    raw[at] ^= mask
    return bytes(raw)


def _truncation(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    key = _pick(scratch, draw)
    size = draw.choice((0, 1, draw.randrange(len(scratch.read(key))), len(scratch.read(key)) - 1))
    return _fault(f"truncation to {size}", key, lambda raw: bytes(raw[:size]))


def _growth(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    key = _pick(scratch, draw)
    more = draw.randbytes(draw.choice((1, 4096)))
    return _fault(f"growth by {len(more)}", key, lambda raw: bytes(raw) + more)


def _deletion(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    return _fault("deletion", _pick(scratch, draw), lambda raw: None)


def _zeroed(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    codes = [key for key in scratch.keys if "/codes/c/" in key]
    key = draw.choice(codes)
    at = draw.randrange(len(scratch.read(key)) - 600)
    return _fault(f"512 zeros at {at}", key, lambda r: bytes(r[:at]) + bytes(512) + r[at + 512 :])


def _swapped_files(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    part = draw.choice(("ffn/experts/w13/codes", "attn/wq_b/codes", "attn/wkv/codes"))
    keys = [scratch.key(f"layers/{layer}/{part}") for layer in (0, 1)]

    def plant(scratch: Scratch) -> None:
        raws = [bytes(scratch.read(key)) for key in keys]
        for key, raw in zip(keys, reversed(raws), strict=True):
            scratch.write(key, raw)

    return Mutation(f"swapped files {keys}", keys[number % 2], plant, repairable=True)


def _swapped_chunks(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    files = [f for f in scratch.store.files_under(None) if f.chunks > 1 and f.chunk_nbytes > 256]
    file = draw.choice(files)
    size = file.chunk_nbytes

    def change(raw: bytearray) -> bytes:
        return bytes(raw[size : 2 * size] + raw[:size] + raw[2 * size :])

    return _fault("swapped chunks", file.key, change)


def _stranger(scratch: Scratch, draw: random.Random, number: int) -> Mutation:
    key = STRANGERS[number]

    def plant(scratch: Scratch) -> None:
        (scratch.root / key).parent.mkdir(exist_ok=True)
        scratch.write(key, b"x")

    return Mutation(f"stranger {key}", key, plant, check="files")


_RAW: dict[str, Callable[[Scratch, random.Random, int], Mutation]] = {
    "bit": _bit,
    "byte": _byte,
    "truncation": _truncation,
    "growth": _growth,
    "deletion": _deletion,
    "zeroed block": _zeroed,
    "swapped files": _swapped_files,
    "swapped chunks": _swapped_chunks,
    "stranger": _stranger,
}
