"""A checkpoint in a local directory: a download, or a snapshot in the hub's cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv4.convert.sources.base import (
    AUX_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    MAX_AUX_BYTES,
    ByteStream,
    Source,
)
from dsv4.convert.sources.contents import read_contents
from dsv4.convert.sources.download_marks import unfinished
from dsv4.convert.sources.files import SourceFiles, is_read
from dsv4.convert.sources.index import is_shard_name, numbered_siblings
from dsv4.convert.sources.local_file import LocalStream, check_size, open_local, read_small
from dsv4.formats.errors import SourceError
from dsv4.formats.model.safetensors_header import (
    LENGTH_BYTES,
    TensorEntry,
    header_length,
    read_header,
)

SAMPLE_BYTES = 1 << 16


class LocalSource(Source):
    """A checkpoint in a local directory.

    Raises SourceError when the directory, config.json, the index, any header or any of the files
    that travel along is not in order.
    """

    here = True

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise SourceError(f"{self._directory} is not a directory; give a checkpoint's")
        names = self._names()
        shards = {name for name in names if is_shard_name(name)}
        marks = unfinished(
            self._directory, {*AUX_FILES, INDEX_FILE, *numbered_siblings(shards), *shards}
        )
        files = SourceFiles.of(names, str(self._directory), marks)
        contents = read_contents(
            files,
            lambda name, limit: read_small(self._path(name), limit),
            lambda shards: map(self._header, shards),
            download="download them",
            stale=f"download {INDEX_FILE} again, or remove it and every safetensors file is read",
        )
        self.config, self.entries, self.notices = (
            contents.config,
            contents.entries,
            contents.notices,
        )
        self.sizes = {name: self._path(name).stat().st_size for name in contents.shards}
        for name in self._aux_names():
            check_size(self._path(name), MAX_AUX_BYTES)

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        """Fill `view` with bytes of `file` from `position` on. Raises SourceError."""
        with self._open(file) as stream:
            stream.position = position
            stream.readinto(view, what)

    @contextlib.contextmanager
    def stream(self, file: str) -> Iterator[ByteStream]:
        """The whole file in order. Raises SourceError when it is not what was opened."""
        with self._open(file) as stream:
            stream.expect_all()
            yield stream

    def fingerprint(self) -> str:
        """A cheap identity: of each file its name, its size, its head, middle and tail."""
        digest = hashlib.sha256()
        for name in [*self.sizes, *self._aux_names()]:
            with self._path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{name}\0{size}\0".encode())
                if name in self.sizes:
                    prefix = file.read(LENGTH_BYTES)
                    digest.update(prefix + file.read(header_length(prefix, size, name)))
                for at in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                    file.seek(at)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def aux_files(self) -> Mapping[str, bytes]:
        """Tokenizer, configs and licences that are present, by name; a fixed list of names."""
        return {n: read_small(self._path(n), MAX_AUX_BYTES) for n in self._aux_names()}

    def _aux_names(self) -> list[str]:
        return sorted(name for name in AUX_FILES if self._listed(name))

    def _names(self) -> list[str]:
        """Names in the directory, of folders with a "/"; of shards, no links to nothing.

        In a directory without config.json, folders that have one are named by it.
        """
        # os.path's functions take what cannot be looked at for absent; Path's raise.
        try:
            found = [path.name for path in self._directory.iterdir()]
        except OSError as error:
            raise SourceError(f"{self._directory} cannot be read: {error.strerror}") from None
        names = []
        for name in found:
            path = self._directory / name
            if os.path.isdir(path) and not is_read(name):  # noqa: PTH112
                names.append(f"{name}/")
            elif os.path.exists(path) or not is_shard_name(name):  # noqa: PTH110
                names.append(name)
        if CONFIG_FILE not in names:
            below = [f"{name}{CONFIG_FILE}" for name in names if name.endswith("/")]
            names += [n for n in below if os.path.isfile(self._directory / n)]  # noqa: PTH113
        return names

    def _listed(self, name: str) -> bool:
        """Whether the directory has the name, be it a link to nothing: a download cut short."""
        return os.path.lexists(self._directory / name)

    def _path(self, name: str) -> Path:
        """The regular file `name` (links are followed: the hub's cache is made of them)."""
        path = self._directory / name
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            if path.is_symlink():
                raise SourceError(
                    f"{path} is a link to a file that does not exist; finish the download of {name}"
                ) from None
            raise SourceError(
                f"{self._directory} has no {name} any more; do not change a checkpoint while it is "
                "read"
            ) from None
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise SourceError(f"{path} is not a regular file")
        return path

    def _header(self, name: str) -> dict[str, TensorEntry]:
        try:
            return read_header(self._path(name))
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error.strerror}") from None

    def _open(self, file: str) -> contextlib.AbstractContextManager[LocalStream]:
        return open_local(self._path(file), self.sizes[file], file)
