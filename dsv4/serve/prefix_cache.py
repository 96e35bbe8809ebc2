"""Beginnings of sequences that are not computed twice.

Blocks of `backend.block` tokens form trees: a block's key is a hash of its tokens and of the key
before it, and the first of them of the store's root, the caches' layout and a salt. Some blocks
have the state at their end: there a sequence may go on. Bytes lie in cells of host memory of the
size of a block; a state takes several. What was not used for longest goes first, children before
parents.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dsv4.serve.backend import Backend

KEY_BYTES = 16
_LEAST_CELL = 64  # bytes
_PIECE_BYTES = 64 << 20  # of host memory that is asked for at once


class Keys:
    """Of the blocks of one sequence, computed once. seed: what the first one is chained to."""

    def __init__(self, root: bytes, layout: bytes, salt: bytes, block: int) -> None:
        parts = (root, layout, salt)
        text = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        self.seed = hashlib.blake2b(text, digest_size=KEY_BYTES).digest()
        self.block = block
        self._keys: list[bytes] = []

    def of(self, ids: Sequence[int], count: int) -> list[bytes]:
        """Of the first `count` blocks of a sequence that begins with `ids`, always the same."""
        while len(self._keys) < count:
            start = len(self._keys) * self.block
            before = self._keys[-1] if self._keys else self.seed
            self._keys.append(chained(before, packed(ids[start : start + self.block])))
        return self._keys[:count]


def packed(ids: Sequence[int]) -> bytes:
    """int32, little-endian on every machine that torch runs on."""
    return array.array("i", ids).tobytes()


def chained(before: bytes, ids: bytes) -> bytes:
    """The key of a block."""
    return hashlib.blake2b(before + ids, digest_size=KEY_BYTES).digest()


@dataclasses.dataclass(eq=False)
class Node:
    """A block. depth: blocks up to its end. state: cells, None without one. used: by which request
    for cells.
    """

    key: bytes
    ids: bytes
    parent: Node | None
    depth: int
    block: Tensor
    state: list[Tensor] | None = None
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    used: int = 0

    def path(self) -> list[Node]:
        """From the first block to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class Shelf(Protocol):
    """Where paths are kept beyond this process."""

    def stored(self, key: bytes) -> bool:
        """Whether a path that ends with `key` may be there."""

    def fetch(self, key: bytes, seed: bytes, into: PrefixCache, keys: list[bytes]) -> bool:
        """Put the path of `keys`, whose last one is `key`, into the cache. False if it is not
        there, damaged, or does not fit.
        """

    def put(self, seed: bytes, path: Sequence[Node]) -> None:
        """Keep a path whose last node has a state."""


class PrefixCache:
    """budget: bytes of host memory at most. root: names the model's weights."""

    def __init__(
        self, backend: Backend, budget: int, root: bytes = b"", shelf: Shelf | None = None
    ) -> None:
        self.backend, self.root, self.shelf = backend, root, shelf
        self.cell_bytes = max(backend.block_bytes, _LEAST_CELL)
        self.state_cells = -(-backend.state_bytes // self.cell_bytes)
        self._most_cells = budget // self.cell_bytes
        self._made = 0
        self._free: list[Tensor] = []
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()  # parents behind their children
        self._first: dict[bytes, dict[bytes, Node]] = {}  # by seed: blocks without a parent
        self._call = 0

    @property
    def blocks(self) -> int:
        """That are remembered."""
        return len(self._nodes)

    @property
    def held_bytes(self) -> int:
        """Of host memory that is in use."""
        return (self._made - len(self._free)) * self.cell_bytes

    def keys(self, salt: bytes) -> Keys:
        """For a new sequence."""
        return Keys(self.root, self.backend.layout, salt, self.backend.block)

    def find(self, keys: Keys, ids: Sequence[int], most: int) -> Node | None:
        """The deepest block with a state that `ids` begin with, at most `most` tokens deep."""
        every = keys.of(ids, max(most, 0) // self.backend.block)
        node = self._find(keys, ids, every)
        if self.shelf is not None:
            for depth in range(len(every), node.depth if node else 0, -1):
                if self.shelf.stored(every[depth - 1]) and self.shelf.fetch(
                    every[depth - 1], keys.seed, self, every[:depth]
                ):
                    node = self._find(keys, ids, every)
                    break
        if node is not None:
            self._touch(node)
        return node

    def _find(self, keys: Keys, ids: Sequence[int], every: Sequence[bytes]) -> Node | None:
        block, found = self.backend.block, None
        for depth, key in enumerate(every):
            node = self._nodes.get(key)
            if node is None or node.ids != packed(ids[depth * block : (depth + 1) * block]):
                break
            if node.state is not None:
                found = node
        return found

    def depth(self, keys: Keys, ids: Sequence[int], most: int) -> int:
        """Tokens up to what `find` finds in memory."""
        node = self._find(keys, ids, keys.of(ids, max(most, 0) // self.backend.block))
        return node.depth * self.backend.block if node else 0

    def known(self, keys: Keys, ids: Sequence[int]) -> tuple[int, int]:
        """-> the tokens in whole blocks that are remembered, with a state or without; and where
        `ids` first differ from anything that is remembered, or end.
        """
        block, node = self.backend.block, None
        for key in keys.of(ids, len(ids) // block):
            if key not in self._nodes:
                break
            node = self._nodes[key]
        start = node.depth * block if node else 0
        rest = ids[start : start + block]
        following = node.children if node else self._first.get(keys.seed, {})
        longest = max(
            (common(rest, array.array("i", one.ids)) for one in following.values()), default=0
        )
        return start, start + longest

    def load(self, slot: int, node: Node) -> None:
        """Make `slot` the sequence up to the end of `node`, which has a state."""
        assert node.state is not None
        blocks = [one.block for one in node.path()]
        self.backend.load(slot, node.depth * self.backend.block, blocks, node.state)

    def keep_blocks(self, slot: int, keys: Keys, ids: Sequence[int], end: int) -> Node | None:
        """Remember the whole blocks of the first `end` tokens of a slot. -> the last of them,
        None where memory does not suffice.
        """
        every = keys.of(ids, end // self.backend.block)
        known = 0
        while known < len(every) and every[known] in self._nodes:
            known += 1
        node = self._nodes[every[known - 1]] if known else None
        if known == len(every):
            if node is not None:
                self._touch(node)
            return node
        cells = self.take(len(every) - known, node)
        if cells is None:
            return None
        self.backend.save_blocks(slot, known, cells)
        for key, cell in zip(every[known:], cells, strict=True):
            node = self.add(keys.seed, node, key, self._ids_of(ids, node), cell)
        return node

    def keep_state(self, slot: int, keys: Keys, ids: Sequence[int], position: int) -> Node | None:
        """Remember that a slot can go on at `position`, a multiple of a block where it just was."""
        node = self.keep_blocks(slot, keys, ids, position)
        if node is None or node.state is not None:
            return node
        cells = self.take(self.state_cells, node)
        if cells is None:
            return None
        self.backend.save_state(slot, position, cells)
        node.state = cells
        return node

    def drop_state(self, node: Node) -> None:
        """It is worth its room no longer."""
        if node.state is not None:
            self._free += node.state
            node.state = None

    def shelve(self, keys: Keys, ids: Sequence[int]) -> None:
        """Keep what is remembered of `ids` beyond this process, up to the last state."""
        if self.shelf is None:
            return
        node = self._find(keys, ids, keys.of(ids, len(ids) // self.backend.block))
        if node is not None:
            self.backend.synchronize()
            self.shelf.put(keys.seed, node.path())

    def add(self, seed: bytes, parent: Node | None, key: bytes, ids: bytes, cell: Tensor) -> Node:
        """A block whose bytes are in `cell`."""
        node = Node(key, ids, parent, parent.depth + 1 if parent else 1, cell)
        self._siblings(seed, parent)[key] = self._nodes[key] = node
        self._touch(node)
        return node

    def get(self, key: bytes) -> Node | None:
        """The block with a key."""
        return self._nodes.get(key)

    def take(self, count: int, path: Node | None) -> list[Tensor] | None:
        """Cells, for which others are forgotten, but for the blocks up to `path`."""
        self._call += 1
        if path is not None:
            self._touch(path)
        while len(self._free) < count and (self._grow(count) or self._forget_one()):
            pass
        if len(self._free) < count:
            return None
        cells = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return cells

    def give(self, cells: Sequence[Tensor]) -> None:
        """Cells that are not needed after all."""
        self._free += cells

    def _ids_of(self, ids: Sequence[int], parent: Node | None) -> bytes:
        start = (parent.depth if parent else 0) * self.backend.block
        return packed(ids[start : start + self.backend.block])

    def _siblings(self, seed: bytes, parent: Node | None) -> dict[bytes, Node]:
        return parent.children if parent is not None else self._first.setdefault(seed, {})

    def _touch(self, node: Node) -> None:
        """Used now, and so is all that it needs; behind it in the order, so that it goes first."""
        one: Node | None = node
        while one is not None:
            one.used = self._call
            self._nodes.move_to_end(one.key)
            one = one.parent

    def _grow(self, count: int) -> bool:
        piece = max(count, _PIECE_BYTES // self.cell_bytes)
        more = min(piece, self._most_cells - self._made)
        if more <= 0:
            return False
        self._free += list(self.backend.cells(more, self.cell_bytes))
        self._made += more
        return True

    def _forget_one(self) -> bool:
        oldest = next(iter(self._nodes.values()), None)
        if oldest is None or oldest.used == self._call:
            return False
        self.forget(oldest)
        return True

    def forget(self, node: Node) -> None:
        """A block without children."""
        assert not node.children
        del self._nodes[node.key]
        if node.parent is not None:
            del node.parent.children[node.key]
        else:
            for seed, first in list(self._first.items()):
                first.pop(node.key, None)
                if not first:
                    del self._first[seed]
        self.drop_state(node)
        self._free.append(node.block)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # by halves: comparing slices is fast
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
