"""Beginnings of prompts on disk: a file for each state, with the blocks since the one before it.

A file's name is the key of its last block, so that it says all of the tokens, the store's root, the
caches' layout and the salt. It is read only if all of that is true of it: the tokens in it are
hashed again from the key of the file before it, and the bytes have a checksum. Files are written
beside their place and renamed, and hold what users wrote: mode 0600, in a directory of mode 0700.

    header    magic, key, key before, blocks, tokens a block, bytes a block, bytes of the state,
              XXH3 of all that follows
    payload   tokens int32, blocks, state
"""

from __future__ import annotations

import contextlib
import os
import queue
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from dsv4.serve.prefix_cache import KEY_BYTES, Node, PrefixCache, chained

MAGIC = b"dsv4 prefix 1\n\0\0"
HEADER = struct.Struct(f"<16s{KEY_BYTES}s{KEY_BYTES}sIIQQQ")
SUFFIX = ".prefix"
LEAST_TOKENS = 2048  # of a prompt that is worth a file
_WAITING_FILES = 8  # to be written; more are left out

_Job = tuple[bytes, bytes, list[bytes]]
"""A file's key, its bytes, and the keys of the files before it, the nearest first."""


class PrefixFiles:
    """place: the directory, made if it is not there. limit: bytes of all files together.

    log: takes a line for people. Raises OSError if the directory cannot be made or read.
    """

    def __init__(
        self,
        place: Path,
        limit: int,
        log: Callable[[str], None] = lambda line: None,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        self.place, self.limit, self.log, self.least_tokens = place, limit, log, least_tokens
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # the one unused for longest first
        self._look()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_WAITING_FILES)
        self._writer = threading.Thread(target=self._write_all, name="dsv4 prefixes", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what waits to be written, and end."""
        if self._writer.is_alive():
            self._jobs.put(None)
            self._writer.join()

    def stored(self, key: bytes) -> bool:
        """See `Shelf`."""
        with self._lock:
            return key in self._sizes

    def fetch(self, key: bytes, seed: bytes, into: PrefixCache, keys: list[bytes]) -> bool:
        """See `Shelf`."""
        depth = len(keys)
        files: list[File] = []
        while depth and not _has_state(into.get(keys[depth - 1])):
            file = self._read(keys[depth - 1], into)
            if file is None:
                for useless in files:
                    self._drop(useless.key)
                return False
            before = keys[depth - file.count - 1] if depth > file.count else seed
            if depth < file.count or file.before != before:
                return False
            files.append(file)
            depth -= file.count
        node = into.get(keys[depth - 1]) if depth else None
        for file in reversed(files):
            node = file.put(into, seed, node)
            if node is None:
                return False
        self._used(file.key for file in files)
        return True

    def put(self, seed: bytes, path: Sequence[Node]) -> None:
        """See `Shelf`. The bytes are copied here, and written by a thread."""
        block = len(path[0].ids) // 4
        if len(path) * block < self.least_tokens:
            return
        start, before_it = 0, list[bytes]()
        for depth, node in enumerate(path, 1):
            if node.state is None:
                continue
            if not self.stored(node.key):
                before = path[start - 1].key if start else seed
                try:
                    data = packed_file(path[start:depth], before)
                    self._jobs.put_nowait((node.key, data, before_it[::-1]))
                except queue.Full:
                    return
            before_it.append(node.key)
            start = depth

    def _look(self) -> None:
        found = []
        for entry in os.scandir(self.place):
            if entry.name.endswith(f"{SUFFIX}.new"):
                with contextlib.suppress(OSError):
                    Path(entry.path).unlink()
            stem = entry.name.removesuffix(SUFFIX)
            with contextlib.suppress(OSError, ValueError):
                if stem != entry.name and len(bytes.fromhex(stem)) == KEY_BYTES:
                    status = entry.stat()
                    found.append((status.st_mtime_ns, bytes.fromhex(stem), status.st_size))
        self._sizes.update((key, size) for _, key, size in sorted(found))
        self._make_room(0)

    def _path(self, key: bytes) -> Path:
        return self.place / f"{key.hex()}{SUFFIX}"

    def _read(self, key: bytes, into: PrefixCache) -> File | None:
        try:
            data = self._path(key).read_bytes()
        except OSError:
            self._drop(key)
            return None
        fault = fault_of(data, key, into)
        if fault is not None:
            self.log(f"{self._path(key)} is not used and removed: {fault}")
            self._drop(key)
            return None
        return File(data)

    def _drop(self, key: bytes) -> None:
        with self._lock:
            self._sizes.pop(key, None)
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _used(self, keys: Iterable[bytes]) -> None:
        """From the last file to the first: what others need is dropped after them."""
        for key in keys:
            with self._lock:
                if key in self._sizes:
                    self._sizes.move_to_end(key)
            with contextlib.suppress(OSError):
                os.utime(self._path(key))

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except OSError as error:
                self.log(f"{self._path(job[0])} cannot be written: {error}")

    def _make_room(self, nbytes: int) -> None:
        with self._lock:
            while self._sizes and sum(self._sizes.values()) + nbytes > self.limit:
                oldest, _ = self._sizes.popitem(last=False)
                with contextlib.suppress(OSError):
                    self._path(oldest).unlink()

    def _write(self, key: bytes, data: bytes, before: list[bytes]) -> None:
        if len(data) > self.limit:
            return
        self._make_room(len(data))
        new = self._path(key).with_suffix(f"{SUFFIX}.new")
        try:
            handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            new.replace(self._path(key))
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        with self._lock:
            self._sizes[key] = len(data)
        self._used(before)


class File:
    """A file's bytes, which are right."""

    def __init__(self, data: bytes) -> None:
        fields = HEADER.unpack_from(data)
        _, self.key, self.before, self.count, self.block, self.width, self.state_bytes, _ = fields
        self._data = data
        self._tokens = HEADER.size
        self._blocks = self._tokens + self.count * self.block * 4
        self._state = self._blocks + self.count * self.width

    def ids(self, number: int) -> bytes:
        """Of a block."""
        start = self._tokens + number * self.block * 4
        return self._data[start : start + self.block * 4]

    def put(self, into: PrefixCache, seed: bytes, node: Node | None) -> Node | None:
        """Behind `node`. -> the last block, None if memory does not suffice."""
        key = node.key if node is not None else seed
        for number in range(self.count):
            key = chained(key, self.ids(number))
            known = into.get(key)
            if known is None:
                cells = into.take(1, node)
                if cells is None:
                    return None
                _fill(cells, self._bytes(self._blocks + number * self.width, self.width))
                known = into.add(seed, node, key, self.ids(number), cells[0])
            node = known
        if node is None or node.state is not None:
            return node
        cells = into.take(into.state_cells, node)
        if cells is None:
            return None
        _fill(cells, self._bytes(self._state, self.state_bytes))
        node.state = cells
        return node

    def _bytes(self, start: int, count: int) -> Tensor:
        array = np.frombuffer(self._data, np.uint8, count, start)
        return torch.from_numpy(array.copy())


def packed_file(nodes: Sequence[Node], before: bytes) -> bytes:
    """The file of `nodes`, of which the last has a state and is all that has."""
    last = nodes[-1]
    assert last.state is not None
    parts = [one.ids for one in nodes]
    parts += [one.block.numpy().tobytes() for one in nodes]
    parts += [cell.numpy().tobytes() for cell in last.state]
    payload = b"".join(parts)
    cell = len(last.block)
    header = HEADER.pack(
        MAGIC,
        last.key,
        before,
        len(nodes),
        len(last.ids) // 4,
        cell,
        cell * len(last.state),
        xxhash.xxh3_64_intdigest(payload),
    )
    return header + payload


def fault_of(data: bytes, key: bytes, into: PrefixCache) -> str | None:
    """What is wrong with a file that should hold `key`, None if nothing is."""
    if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
        return "it does not begin as such a file does"
    _, own, before, count, block, width, state_bytes, checksum = HEADER.unpack_from(data)
    if block != into.backend.block or width != into.cell_bytes:
        return "it is of caches of another layout"
    wanted = HEADER.size + count * (block * 4 + width) + state_bytes
    if len(data) != wanted or state_bytes != into.state_cells * into.cell_bytes or not count:
        return f"it has {len(data)} bytes, expected {wanted}"
    if xxhash.xxh3_64_intdigest(memoryview(data)[HEADER.size :]) != checksum:
        return "its bytes are not those that were written"
    file = File(data)
    for number in range(count):
        before = chained(before, file.ids(number))
    if own != key or before != key:
        return "it holds other tokens than its name says"
    return None


def _fill(cells: Sequence[Tensor], data: Tensor) -> None:
    for cell, part in zip(cells, torch.split(data, len(cells[0])) if cells else (), strict=True):
        cell[: len(part)] = part


def _has_state(node: Node | None) -> bool:
    return node is not None and node.state is not None
