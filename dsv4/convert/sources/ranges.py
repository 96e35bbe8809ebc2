"""Byte ranges over HTTP: every answer is checked to be the range that was asked for.

A hub answers a GET with a redirect to storage, whose signed address soon expires; so files are read
in ranges of bounded length, and each range, first try or not, starts at the hub again. Whatever
breaks is continued at the byte where it broke. What arrives is not hashed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import httpx2

from dsv4.convert.sources.http import BrokenError, Patience, check_status
from dsv4.convert.sources.hub_client import client, lost, send
from dsv4.convert.sources.hub_login import Login
from dsv4.formats.errors import SourceError

RANGE_BYTES = 1 << 28  # long enough for few requests (Pro: 3,200), short enough for one address
MAX_REDIRECTS = 5
_MAX_REDIRECT_BODY = 1 << 16
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's name of a file, or its SHA-256
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository: hub id, name, address, bytes, SHA-256 in hex if published."""

    repo: str
    name: str
    url: str
    size: int
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


class RangeReader:
    """Reads remote files. One may serve many threads: nothing but remembered tags is shared.

    login: sent with every request; its token only to the host of the file's own address.
    """

    def __init__(self, login: Login, patience: Patience) -> None:
        self.patience = patience
        self._login = login
        self._headers = {**login.headers, "Accept-Encoding": "identity"}
        self._tags: dict[tuple[str, bytes, str], str] = {}

    def read_into(self, file: RemoteFile, position: int, view: memoryview, what: str) -> None:
        """Fill `view` with bytes of `file` from `position` on. Raises SourceError."""
        with contextlib.closing(_Cursor(self, file, position, position + len(view))) as cursor:
            cursor.readinto(view, what)

    @contextlib.contextmanager
    def stream(self, file: RemoteFile, begin: int = 0, end: int | None = None) -> Iterator[_Cursor]:
        """Bytes `[begin, end)` of the file, all by default; `readinto` raises SourceError."""
        stop = file.size if end is None else end
        with contextlib.closing(_Cursor(self, file, begin, stop)) as cursor:
            yield cursor

    def open(self, file: RemoteFile, begin: int, end: int) -> httpx2.Response:
        """The open answer whose body is bytes `[begin, end)` of `file`; the caller closes it.

        Raises SourceError; BrokenError when another attempt may succeed.
        """
        request: httpx2.Request | None = client().build_request(
            "GET",
            file.url,
            headers={**self._headers, "Range": f"bytes={begin}-{end - 1}"},
            timeout=self.patience.timeout,
        )
        secure, home = False, httpx2.URL(file.url).netloc
        for _ in range(MAX_REDIRECTS + 1):
            assert request is not None
            secure = _check_scheme(file, request.url, secure)
            response = send(request, stream=True, follow_redirects=False)
            with contextlib.ExitStack() as undo:
                undo.callback(response.close)
                self._check_tag(file, response)
                request = response.next_request  # httpx2 drops Authorization for another host
                if request is None:
                    elsewhere = response.request.url.netloc != home
                    check_status(response, file.repo, str(file), self._login, elsewhere=elsewhere)
                    _check_range(file, response, begin, end)
                    undo.pop_all()
                    return response
                _drain(response)
        raise SourceError(
            f"{file} is redirected more than {MAX_REDIRECTS} times; check HF_ENDPOINT"
        )

    def _check_tag(self, file: RemoteFile, response: httpx2.Response) -> None:
        """What the hub says the content is, is the published hash, or stays what it was.

        X-Linked-Etag is the hub's own word. An ETag may be of a server's own making (a clock, an
        upload in parts) and differ between servers of one name: it counts only where no hash was
        published, and only if it is a hash. What arrives is compared with a published one later.
        """
        header = "X-Linked-Etag" if "X-Linked-Etag" in response.headers else "ETag"
        tag = response.headers.get(header, "").removeprefix("W/").strip('"')
        if header == "ETag" and not (
            response.is_success and file.sha256 is None and _HASH.fullmatch(tag)
        ):
            return
        if not tag:
            return
        published = file.sha256 or tag
        key = (file.name, response.request.url.netloc, header)
        if tag != published or self._tags.setdefault(key, tag) != tag:
            raise SourceError(
                f"{file} changed while it was read; run the command again, with --revision set to "
                "a commit"
            )


class _Cursor:
    """Bytes `[position, stop)` of a file, in order. At most one answer is open at a time."""

    def __init__(self, reader: RangeReader, file: RemoteFile, position: int, stop: int) -> None:
        self._reader = reader
        self._file = file
        self._arrived = position  # the position of the next byte to come from the network
        self._stop = stop
        self._end = position  # of the open range
        self._answer: httpx2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")

    def readinto(self, view: memoryview, what: str = "it") -> None:
        """Fill `view` with the bytes that come next. Raises SourceError, naming `what`."""
        if len(view) > len(self._rest) + self._stop - self._arrived or self._stop > self._file.size:
            raise SourceError(f"{self._file} ended while {what} was read")
        while view:
            if not self._rest:
                chunk = self._reader.patience.persist(str(self._file), self._arrive)
                self._rest = memoryview(chunk)
            count = min(len(self._rest), len(view))
            view[:count] = self._rest[:count]
            view, self._rest = view[count:], self._rest[count:]

    def close(self) -> None:
        """Give up the open answer, if any."""
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _arrive(self) -> bytes:
        """The next bytes from the network, at least one."""
        try:
            if self._answer is None:
                self._end = min(self._arrived + RANGE_BYTES, self._stop)
                self._answer = self._reader.open(self._file, self._arrived, self._end)
                self._chunks = self._answer.iter_raw()
            chunk = next(self._chunks, b"")
        except httpx2.RequestError as error:
            self.close()
            raise lost(error) from None
        if not chunk:
            self.close()
            raise BrokenError(f"the answer ended {self._end - self._arrived} bytes early")
        self._arrived += len(chunk)
        if self._arrived >= self._end:
            self._finish()
        return chunk

    def _finish(self) -> None:
        """The range is complete: nothing may follow, and the connection can be used again."""
        with contextlib.suppress(httpx2.RequestError):  # every byte of it has arrived
            self._arrived += len(next(self._chunks, b""))
        self.close()
        if self._arrived > self._end:
            raise SourceError(
                f"{self._file}: the answer is longer than the range asked for; check HF_ENDPOINT"
            )


def _check_scheme(file: RemoteFile, url: httpx2.URL, secure: bool) -> bool:
    """Whether `url` is https; SourceError unless it is http(s), and never less secure again."""
    if url.scheme not in ("http", "https") or (secure and url.scheme == "http"):
        raise SourceError(f"{file} is redirected to a {url.scheme} address; check HF_ENDPOINT")
    return url.scheme == "https"


def _check_range(file: RemoteFile, response: httpx2.Response, begin: int, end: int) -> None:
    """Raise SourceError unless the headers promise exactly bytes `[begin, end)` of `file`."""
    headers = response.headers
    if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
        raise SourceError(
            f"{file} arrives with the content encoding {encoding!r:.40}, which was not asked for; "
            "check HF_ENDPOINT and any proxy between"
        )
    whole = (begin, end) == (0, file.size)
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        found = tuple(map(int, match.groups())) if match else None
        if found != (begin, end - 1, file.size):
            raise SourceError(
                f"{file}: bytes {begin}-{end - 1}/{file.size} were asked for, the answer has "
                f"{headers.get('Content-Range', 'none')!r:.80}; run the command again, and check "
                "HF_ENDPOINT if that does not help"
            )
    elif response.status_code != 200 or not whole:
        raise SourceError(
            f"{file}: a byte range was asked for, the answer is {response.status_code} instead of "
            "206; use an endpoint that serves ranges, or download the repository and give its "
            "directory"
        )
    if (length := headers.get("Content-Length", str(end - begin))) != str(end - begin):
        raise SourceError(
            f"{file}: {end - begin} bytes were asked for, the answer promises {length!r:.40}; "
            "run the command again, and check HF_ENDPOINT if that does not help"
        )


def _drain(response: httpx2.Response) -> None:
    """Read a redirect's short body, so that its connection can be used again."""
    length = 0
    for chunk in response.iter_raw():
        length += len(chunk)
        if length > _MAX_REDIRECT_BODY:
            return
