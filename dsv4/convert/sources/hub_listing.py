"""What a hub says a commit has: sent for, then read, and completed where a mirror leaves sizes out.

An answer is taken at none of its words: what is not a listing is refused, and what it says of a
file is checked against the file later.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id  # type: ignore[attr-defined]  # lazy

from dsv4.convert.sources.files import is_read
from dsv4.convert.sources.http import Patience, check_status
from dsv4.convert.sources.hub_client import client, send, shown
from dsv4.convert.sources.hub_login import Login
from dsv4.convert.sources.index import MAX_SHARDS
from dsv4.formats.errors import SourceError
from dsv4.formats.plain_text import printable

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIZE = re.compile(r"\d{1,18}")
_MAX_HOPS = 5
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file of a commit: bytes, SHA-256 (hex) if it is an LFS file, git's blob id if known."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None


@dataclasses.dataclass(frozen=True)
class Listing:
    """repo: by the name that the hub has for it now. commit: 40 hex digits. names: of all files.

    files: those that are read.
    """

    repo: str
    commit: str
    names: Sequence[str]
    files: Sequence[Listed]


@dataclasses.dataclass(frozen=True)
class Lister:
    """Asks a hub. endpoint: its address."""

    endpoint: str
    login: Login
    patience: Patience

    def list(
        self,
        repo: str,
        revision: str | None,
        wanted: Callable[[str], bool] = is_read,
        most: int | None = None,
    ) -> Listing:
        """One commit, all from one answer where it says all.

        wanted: whether a file of this name is of use. most: such files, at most; None: as many as
        a checkpoint has. Raises SourceError, NetworkError when nothing answers.
        """
        subject = repo if revision is None else f"{repo}@{printable(revision, 100)}"
        url = f"{self.endpoint}/api/models/{repo}"
        if revision is not None:
            # A byte that is not text comes from the command line as half a character.
            url += f"/revision/{urllib.parse.quote(revision, safe='', errors='surrogateescape')}"
        answer = self.patience.persist(
            subject, lambda: self._ask("GET", f"{url}?blobs=true", repo, subject)
        )
        hf_raise_for_status(answer)  # which also shows the hub's warnings, once
        try:
            document = json.loads(answer.content)
            commit, names, found = _read(document, wanted, MAX_SHARDS if most is None else most)
            if answer.history:
                repo = _present_name(document, repo)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SourceError(
                f"{subject}: the answer of {shown(self.endpoint)} is not a hub's "
                f"({_what_is_wrong(answer, error)}); check HF_ENDPOINT, and that the network here "
                "does not want a login in a browser"
            ) from None
        with ThreadPoolExecutor(_THREADS) as pool:
            files = list(pool.map(lambda file: self._complete(repo, commit, *file), found))
        return Listing(repo, commit, names, files)

    def _ask(self, method: str, url: str, repo: str, subject: str) -> httpx2.Response:
        request = client().build_request(
            method, url, headers=dict(self.login.headers), timeout=self.patience.timeout
        )
        answer = send(request, stream=False, follow_redirects=method == "GET")
        if not answer.has_redirect_location:
            elsewhere = answer.request.url.netloc != request.url.netloc
            check_status(answer, repo, subject, self.login, elsewhere=elsewhere)
        return answer

    def _complete(
        self, repo: str, commit: str, name: str, size: int | None, sha: str | None, blob: str | None
    ) -> Listed:
        """With what the hub says of the file itself, where the listing has no size."""
        if size is not None:
            return Listed(name, size, sha, blob)
        subject = f"{repo}/{name}"
        headers = self._headers_of(repo, commit, name, subject)
        said = headers.get("X-Linked-Size")
        if said is None and "Location" not in headers:
            said = headers.get("Content-Length")
        if said is None or not _SIZE.fullmatch(said):
            raise SourceError(
                f"{subject}: neither the listing nor the file's own headers say how large it is; "
                "use another HF_ENDPOINT, or download the repository and give its directory"
            )
        tag = headers.get("X-Linked-Etag", headers.get("ETag", "")).removeprefix("W/").strip('"')
        is_sha, is_blob = _SHA256.fullmatch(tag), _COMMIT.fullmatch(tag)
        return Listed(name, int(said), sha or (tag if is_sha else None), tag if is_blob else blob)

    def _headers_of(self, repo: str, commit: str, name: str, subject: str) -> httpx2.Headers:
        """What the hub itself says of a file: the first answer that says it, or leads elsewhere."""
        url = httpx2.URL(hf_hub_url(repo, name, revision=commit, endpoint=self.endpoint))
        for _ in range(_MAX_HOPS):
            ask = functools.partial(self._ask, "HEAD", str(url), repo, subject)
            headers = self.patience.persist(subject, ask).headers
            target = url.join(headers.get("Location", ""))
            if (
                "X-Linked-Size" in headers
                or "Location" not in headers
                or target.netloc != url.netloc
            ):
                break
            url = target
        return headers


_Found = tuple[str, int | None, str | None, str | None]


def _read(
    document: Any, wanted: Callable[[str], bool], most: int
) -> tuple[str, list[str], list[_Found]]:
    """-> (commit, all names, useful files with sizes, hashes and blob ids where they are given)."""
    if not isinstance(document, dict):
        raise TypeError("it is not an object of JSON")
    commit, siblings = document["sha"], document.get("siblings") or []
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r:.80} is not a commit")
    names = [sibling["rfilename"] for sibling in siblings]
    useful = [sibling for sibling in siblings if wanted(sibling["rfilename"])]
    if len(useful) > most:
        raise ValueError(f"it lists {len(useful)} files")
    return commit, names, [_listed(sibling) for sibling in useful]


def _listed(sibling: dict[str, Any]) -> _Found:
    name, lfs, blob_id = sibling["rfilename"], sibling.get("lfs") or {}, sibling.get("blobId")
    size, sha256 = sibling.get("size"), lfs.get("sha256")
    size = lfs.get("size") if size is None else size
    if size is not None and (type(size) is not int or size < 0):
        raise ValueError(f"{name} has the size {size!r:.80}")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError(f"{name} has the SHA-256 {sha256!r:.80}")
    if blob_id is not None and not _COMMIT.fullmatch(blob_id):
        raise ValueError(f"{name} has the blob id {blob_id!r:.80}")
    return name, size, sha256, blob_id


def _present_name(document: dict[str, Any], repo: str) -> str:
    """The name to which a redirect led, if the answer says one."""
    name = document.get("id", repo)
    validate_repo_id(name)
    if "/" not in name:
        raise ValueError(f"{name!r:.80} is not a hub id")
    return str(name)


def _what_is_wrong(answer: httpx2.Response, error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        kind = answer.headers.get("Content-Type", "of no type").partition(";")[0]
        return f"it is not JSON, but {printable(kind, 40)}"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return printable(str(error), 200)
