"""PTX text to instructions. Names declared in a `{ … }` block belong to it."""

from __future__ import annotations

import dataclasses
import re
import struct
from typing import Any

_STATEMENT = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?")
_NUMBER = re.compile(r"-?\d+|0[xX][0-9a-fA-F]+")

Operand = tuple[Any, ...]
"""("r", register) · ("i", bits) · ("v", operands) · ("m", operand, offset, coordinates) ·
("l", label) · ("s", symbol) · ("_",) · ("e", register, predicate)."""


@dataclasses.dataclass
class Instruction:
    """op: its parts; guard: (predicate, whether negated); target: index that a branch goes to."""

    op: tuple[str, ...]
    operands: list[Operand]
    guard: tuple[str, bool] | None
    text: str
    target: int = -1


@dataclasses.dataclass(frozen=True)
class Program:
    """The one kernel of a PTX module. parameters: name -> bytes, in order."""

    instructions: list[Instruction]
    parameters: dict[str, int]


def parse(ptx: str) -> Program:
    """Read the module; raises ValueError for what is not understood."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    head, _, rest = ptx.partition(".entry")
    assert head.count(".entry") == 0
    parameters, _, body = rest.partition("{")
    reader = _Reader()
    reader.read(body)
    sizes = {"b8": 1, "b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8}
    return Program(
        reader.instructions,
        {
            name: sizes[kind] * int(count or 1)
            for _, kind, name, count in _PARAMETER.findall(parameters)
        },
    )


class _Reader:
    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.scopes: list[dict[str, str]] = [{}]
        self.labels: list[dict[str, int]] = [{}]
        self.blocks = 0

    def read(self, body: str) -> None:
        at, depth = 0, 1
        branches: list[tuple[Instruction, str, list[dict[str, int]]]] = []
        while depth:
            found = _STATEMENT.match(body, at)
            if found is None:
                raise ValueError(f"PTX not understood: {body[at : at + 80]!r}")
            at = found.end()
            opened, closed, label, statement = found.groups()
            if opened:
                depth += 1
                self.blocks += 1
                self.scopes.append({})
                self.labels.append({})
            elif closed:
                depth -= 1
                self.scopes.pop()
                self.labels.pop()
            elif label:
                self.labels[-1][label] = len(self.instructions)
            elif statement.strip():
                self._statement(statement.strip(), branches)
        for branch, label, tables in branches:
            branch.target = next(t[label] for t in reversed(tables) if label in t)

    def _statement(self, text: str, branches: list[Any]) -> None:
        if text.startswith((".pragma", ".loc")):
            return
        if text.startswith(".reg"):
            for name in text.split(None, 2)[2].split(","):
                self.scopes[-1][name.strip()] = f"{name.strip()}@{self.blocks}"
            return
        guard = None
        if text.startswith("@"):
            mark, text = text.split(None, 1)
            guard = (self._name(mark.lstrip("@!")), "!" in mark)
        op, _, rest = text.partition(" ") if " " in text else text.partition("\t")
        operands = [self._operand(part) for part in _split(rest)]
        one = Instruction(tuple(op.strip().split(".")), operands, guard, text)
        if one.op[0] == "bra":
            branches.append((one, rest.strip(), list(self.labels)))
        self.instructions.append(one)

    def _name(self, name: str) -> str:
        return next((s[name] for s in reversed(self.scopes) if name in s), name)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return ("_",)
        if text.startswith("{"):
            return ("v", [self._operand(part) for part in _split(text[1:-1])])
        if text.startswith("["):
            parts = _split(text[1:-1])
            base, _, offset = parts[0].partition("+")
            coordinates = self._operand(parts[1]) if len(parts) > 1 else None
            return ("m", self._operand(base), int(offset or "0", 0), coordinates)
        if "|" in text:
            register, predicate = text.split("|")
            return ("e", self._name(register), self._name(predicate))
        if text.startswith("0f"):
            return ("i", int(text[2:], 16))
        if text.startswith("0d"):
            return ("i", int(struct.unpack(">Q", bytes.fromhex(text[2:]))[0]))
        if _NUMBER.fullmatch(text):
            return ("i", int(text, 0))
        name = self._name(text)
        if name.startswith("%") or "@" in name:
            return ("r", name)
        return ("s", name)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and not depth:
            parts.append(text[begin:i])
            begin = i + 1
    return [part for part in [*parts, text[begin:]] if part.strip()]
