"""A checkpoint in a hub repository, read over the network without touching the disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv4.convert.sources.base import (
    AUX_FILES,
    MAX_AUX_BYTES,
    ByteStream,
    Source,
)
from dsv4.convert.sources.contents import read_contents
from dsv4.convert.sources.files import SourceFiles
from dsv4.convert.sources.http import Patience, Waits
from dsv4.convert.sources.hub_repo import HubRepo
from dsv4.formats.model.safetensors_header import (
    LENGTH_BYTES,
    TensorEntry,
    header_length,
    parse_header,
)

HEAD_BYTES = 1 << 18  # holds the header of a file of 2,000 tensors: one request per file
THREADS = 8


class HubSource(Source):
    """A checkpoint in a hub repository, pinned to one commit.

    revision: branch, tag or commit; None: the default branch. endpoint, token, cache: instead of
    what HF_ENDPOINT, the stored login (or HF_TOKEN) and HF_HUB_CACHE say. Files that the cache has
    at this commit are read from it. With HF_HUB_OFFLINE set, all of them must be there.
    on_wait: told, in a sentence, what is waited for before it is tried again; may be set later.
    Raises SourceError when the repository or any header is not in order, NetworkError when the hub
    does not answer.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        endpoint: str | None = None,
        token: str | bool | None = None,
        cache: Path | None = None,
        patience: Patience | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.on_wait = on_wait
        self._waits = Waits(repo, self._tell)
        self._hub = HubRepo(
            repo,
            revision,
            endpoint=endpoint,
            token=token,
            cache=cache,
            patience=self._waits.patience(patience),
        )
        self.commit = self._hub.commit
        self.origin = {"kind": "hub", "repo": self._hub.repo, "commit": self.commit}
        download, stale = "choose another revision", "choose another revision, or tell its owner"
        if self._hub.offline:
            download = "download them, or unset HF_HUB_OFFLINE"
        files = SourceFiles.of(self._hub.names, f"{self._hub.repo}@{self.commit[:12]}")
        with ThreadPoolExecutor(THREADS) as pool:
            contents = read_contents(
                files,
                self._hub.read_small,
                lambda shards: pool.map(self._header, shards),
                download=download,
                stale=stale,
            )
        self.config, self.entries, self.notices = (
            contents.config,
            contents.entries,
            self._hub.notices + contents.notices,
        )
        self.sizes = {name: self._hub.files[name].size for name in contents.shards}

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        """Fill `view` with bytes of `file` from `position` on. Raises SourceError."""
        self._hub.read_into(file, position, view, what)

    def stream(self, file: str) -> contextlib.AbstractContextManager[ByteStream]:
        """The whole file in order. Raises SourceError when it is not what was opened."""
        return self._hub.stream(file)

    def aux_files(self) -> Mapping[str, bytes]:
        """Tokenizer, configs and licences the repository has, by name; a fixed list of names."""
        return self._aux

    def fingerprint(self) -> str:
        """Of repository, commit, sizes, published hashes and the files that travel along."""
        shards = [[n, size, self.published_sha256(n)] for n, size in self.sizes.items()]
        aux = [[n, len(raw), hashlib.sha256(raw).hexdigest()] for n, raw in self._aux.items()]
        identity = json.dumps([self._hub.repo, self.commit, shards, aux])
        return hashlib.sha256(identity.encode()).hexdigest()

    def give_up(self) -> None:
        """Whoever waits for the network fails."""
        self._waits.give_up()

    def _tell(self, sentence: str) -> None:
        if self.on_wait is not None:
            self.on_wait(sentence)

    def published_sha256(self, file: str) -> str | None:
        """The LFS hash of the repository; None for a file that is not in LFS."""
        return self._hub.files[file].sha256

    def remote_bytes(self, file: str) -> int:
        """Bytes of `file` that have to come over the network: all or, from the cache, none."""
        return 0 if self._hub.files[file].cached is not None else self.sizes[file]

    @functools.cached_property
    def _aux(self) -> dict[str, bytes]:
        names = sorted(name for name in AUX_FILES if name in self._hub.files)
        with ThreadPoolExecutor(THREADS) as pool:
            contents = pool.map(lambda name: self._hub.read_small(name, MAX_AUX_BYTES), names)
            return dict(zip(names, contents, strict=True))

    def _header(self, name: str) -> dict[str, TensorEntry]:
        size = self._hub.files[name].size
        head = self._read(name, 0, min(size, HEAD_BYTES))
        end = LENGTH_BYTES + header_length(head, size, name)
        if end > len(head):
            head += self._read(name, len(head), end)
        return parse_header(head, size, name)

    def _read(self, name: str, begin: int, end: int) -> bytes:
        raw = bytearray(end - begin)
        self.read_into(name, begin, memoryview(raw), "its header")
        return bytes(raw)
