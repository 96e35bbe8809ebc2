"""One commit of a hub repository: which of its files are of use, and their bytes.

The huggingface_hub library resolves the revision, knows tokens, endpoint, offline mode and cache;
its downloads are not used, because they check sizes only and go through the disk. Nothing is ever
written to the cache. Names of the repository are asked for, never used as paths of our own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # lazy

from dsv4.convert.sources.base import CONFIG_FILE, ByteStream
from dsv4.convert.sources.files import is_read
from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub_client import shown
from dsv4.convert.sources.hub_listing import Listed, Lister, Listing
from dsv4.convert.sources.hub_login import Login, make_login
from dsv4.convert.sources.local_file import open_local, read_small
from dsv4.convert.sources.ranges import RangeReader, RemoteFile
from dsv4.formats.errors import SourceError
from dsv4.formats.version import VERSION

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of one commit: bytes, SHA-256 (hex) if it is an LFS file, else git's blob id if known.

    cached: where this machine already has it, with this size.
    """

    name: str
    size: int
    sha256: str | None
    blob_id: str | None
    cached: Path | None

    def is_content(self, data: bytes) -> bool:
        """Whether `data` has the hash that the repository gives, if it gives one."""
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        # No promise against attackers, but git names its files so.
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return self.blob_id in (None, found)


class HubRepo:
    """One commit of a hub repository: `files` by name, those that are `wanted`.

    By default these are shards and small files of a checkpoint.
    repo: its hub id, by the name that the hub has for it now; notices: says so if that is another.
    names: of all of its files, and of the folders that a cache has, these with a "/" at the end.
    commit: 40 hex digits; every request is for it. Raises SourceError when the name, the revision
    or the login is not in order, or, in offline mode, when the cache does not have the commit;
    NetworkError when the hub does not answer.
    """

    notices: tuple[str, ...] = ()
    commit: str
    files: Mapping[str, HubFile]
    names: Sequence[str]

    def __init__(
        self,
        repo: str,
        revision: str | None,
        *,
        endpoint: str | None,
        token: str | bool | None,
        cache: Path | None,
        patience: Patience,
        wanted: Callable[[str], bool] = is_read,
        most: int | None = None,
    ) -> None:
        _check_repo_id(repo)
        self.repo = repo
        self.offline = is_offline_mode()
        self._cache = cache
        self._api = HfApi(endpoint, token=token, library_name="dsv4", library_version=VERSION)
        _check_endpoint(self._api.endpoint)
        login = Login({}) if self.offline else make_login(token)
        self._reader = RangeReader(login, patience)
        if self.offline:
            self.commit, self.files = self._cached_commit(revision)
        else:
            lister = Lister(self._api.endpoint, login, patience)
            listing = lister.list(repo, revision, wanted, most)
            self.commit, self.files = self._listed_commit(listing)

    def read_small(self, name: str, limit: int) -> bytes:
        """All of a file, its hash checked where the repository gives one.

        Raises SourceError, also when it is larger than `limit` bytes.
        """
        file = self.files[name]
        if file.size > limit:
            raise SourceError(
                f"{self.repo}/{name} is larger than {limit} bytes, which no real one is"
            )
        if file.cached is not None:
            data = read_small(file.cached, limit)
            if file.is_content(data):
                return data
            if self.offline:
                raise SourceError(
                    f"{file.cached} does not have the hash it is named by; delete it and download "
                    f"{self.repo} again"
                )
        raw = bytearray(file.size)
        self._reader.read_into(self._remote(file), 0, memoryview(raw), "it")
        if not file.is_content(data := bytes(raw)):
            raise SourceError(
                f"{self.repo}/{name} arrived with another hash than the repository lists; run the "
                "command again, and check HF_ENDPOINT if that does not help"
            )
        return data

    def read_into(self, name: str, position: int, view: memoryview, what: str) -> None:
        """Fill `view` with bytes of a file from `position` on. Raises SourceError."""
        file = self.files[name]
        if file.cached is None:
            self._reader.read_into(self._remote(file), position, view, what)
            return
        with open_local(file.cached, file.size, name) as stream:
            stream.position = position
            stream.readinto(view, what)

    @contextlib.contextmanager
    def stream(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[ByteStream]:
        """Bytes `[begin, end)` of a file in order, all by default. Raises SourceError."""
        file = self.files[name]
        if file.cached is None:
            with self._reader.stream(self._remote(file), begin, end) as remote:
                yield remote
        else:
            with open_local(file.cached, file.size, name) as local:
                local.position = begin
                local.expect_all()
                yield local

    def _remote(self, file: HubFile) -> RemoteFile:
        url = hf_hub_url(self.repo, file.name, revision=self.commit, endpoint=self._api.endpoint)
        return RemoteFile(self.repo, file.name, url, file.size, file.sha256)

    def _listed_commit(self, listing: Listing) -> tuple[str, Mapping[str, HubFile]]:
        """Commit and files as the hub has them."""
        if listing.repo != self.repo:
            self.notices = (
                f"{self.repo} is called {listing.repo} on the hub now, and is read and recorded "
                "under that name",
            )
            self.repo = listing.repo
        self.names = listing.names
        return listing.commit, {f.name: self._hub_file(f, listing.commit) for f in listing.files}

    def _hub_file(self, listed: Listed, commit: str) -> HubFile:
        cached = self._in_cache(listed.name, commit)
        if cached is not None and cached.stat().st_size != listed.size:
            cached = None
        return HubFile(listed.name, listed.size, listed.sha256, listed.blob_id, cached)

    def _cached_commit(self, revision: str | None) -> tuple[str, Mapping[str, HubFile]]:
        """Commit and files as this machine's cache has them."""
        commit = ""
        with contextlib.suppress(RevisionResolutionError):
            commit = self._api.resolve_revision(
                self.repo, revision=revision, cache_dir=self._cache, local_files_only=True
            ).resolved
        config = self._in_cache(CONFIG_FILE, commit) if _COMMIT.fullmatch(commit) else None
        if config is None:
            raise SourceError(
                f"{self.repo}@{revision or 'main'} is not in the hub's cache and offline mode is "
                "set; download it first, or unset HF_HUB_OFFLINE"
            )
        present = sorted(path.name for path in config.parent.iterdir())
        # A link to nothing is a shard that is missing, and is told as that.
        self.names = [
            f"{path.name}/" if path.is_dir() else path.name
            for path in config.parent.iterdir()
            if path.exists()
        ]
        files = {}
        for name in filter(is_read, present):
            if (path := self._in_cache(name, commit)) is not None:
                # Links lead to blobs, and those of LFS files are named by their SHA-256. One step
                # only: a blob may itself be a link to a store shared by repositories.
                blob = path.readlink().name if path.is_symlink() else ""
                sha256 = blob if _SHA256.fullmatch(blob) else None
                files[name] = HubFile(name, path.stat().st_size, sha256, None, path)
        return commit, files

    def _in_cache(self, name: str, commit: str) -> Path | None:
        found = try_to_load_from_cache(self.repo, name, cache_dir=self._cache, revision=commit)
        return Path(found) if isinstance(found, str) else None


def _check_repo_id(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SourceError(f"{repo!r:.200} is not a hub id such as org/name: {error}") from None
    if "/" not in repo:
        raise SourceError(f"{repo} is not a hub id such as org/name; give both parts")


def _check_endpoint(endpoint: str) -> None:
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise SourceError(
            f"HF_ENDPOINT is {shown(endpoint)!r}, expected an address that begins with https:// or "
            "http://; correct it, or unset it to read from huggingface.co"
        )
