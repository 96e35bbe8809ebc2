"""A hub on this machine: serves a checkpoint as huggingface.co does, and fails on command.

Two servers: the hub itself (API, small files, redirects for LFS files) and the storage it redirects
to, on another port. Every request is logged, every body byte counted, and planted faults change
answers on their way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
OLD_COMMIT = "dead" + "1" * 36
TOKEN = "hf_loopback"
NOWHERE = "http://127.0.0.1:9"


@dataclasses.dataclass
class Answer:
    """What is about to be sent. A fault changes it in place.

    cut: bytes of the body after which the connection is closed. stall: seconds to wait there,
    or before the headers when there is no cut. framed: in chunks, without a Content-Length.
    """

    status: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    stall: float = 0.0
    framed: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as it came in. begin, end: of the range, if one was asked for."""

    host: str
    method: str
    path: str
    file: str | None
    begin: int | None
    end: int | None
    token: str | None
    body: bytes = b""


Change = Callable[[Answer], object]


@dataclasses.dataclass
class _Fault:
    change: Change
    host: str
    file: str | None
    skip: int
    times: int


class Faults:
    """Planted faults, one to an answer; each is used up after `times` answers."""

    def __init__(self) -> None:
        self._planted: list[_Fault] = []
        self._lock = threading.Lock()

    def plant(
        self,
        change: Change,
        *,
        host: str = "storage",
        file: str | None = None,
        skip: int = 0,
        times: int = 1,
    ) -> None:
        """Apply `change` to answers of `host` (api, hub, storage) for `file`, after `skip`."""
        self._planted.append(_Fault(change, host, file, skip, times))

    def apply(self, host: str, file: str | None, answer: Answer) -> None:
        """Let the first fault that is due change the answer."""
        for fault in self._planted:
            if fault.host != host or fault.file not in (None, file) or not fault.times:
                continue
            with self._lock:
                due = fault.skip == 0
                fault.times -= due
                fault.skip -= not due
            if due:
                fault.change(answer)
                return


FOREVER = 1 << 30


def says(status: int, **headers: str) -> Change:
    """Another status, with headers (`_` for `-`), and a page for a body."""

    def change(answer: Answer) -> None:
        answer.status, answer.body = status, b"an error page"
        answer.headers = {k.replace("_", "-"): v for k, v in headers.items()}
        if status >= 400:
            answer.headers["ETag"] = 'W/"of-the-error-page"'

    return change


def cuts(after: int) -> Change:
    """The connection breaks after so many bytes of the body."""
    return lambda answer: setattr(answer, "cut", after)


def stalls(after: int | None, seconds: float) -> Change:
    """Nothing comes for a while, after so many bytes of the body or (None) at all."""

    def change(answer: Answer) -> None:
        answer.cut, answer.stall = after, seconds

    return change


def with_header(name: str, value: str) -> Change:
    """One header set."""
    return lambda answer: answer.headers.update({name: value})


def with_body(edit: Callable[[bytes], bytes], *, framed: bool = False) -> Change:
    """Another body under the same headers; framed: without a Content-Length."""

    def change(answer: Answer) -> None:
        answer.body, answer.framed = edit(answer.body), framed

    return change


class Loopback:
    """The running hub: `endpoint`, `repo`, `commit`, `faults`, and what it has served."""

    def __init__(self, directory: Path, repo: str, access: str) -> None:
        self.repo = repo
        self.access = access
        self.commit = COMMIT
        self.revisions = {"main": COMMIT, "v1": OLD_COMMIT, "feature/x": COMMIT}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.contents = {
            path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()
        }
        self.listing = [self._listed(name) for name in self.contents]
        self._sent: dict[str | None, int] = {}
        self._lock = threading.Lock()
        self.hub = _Server(self, "hub")
        self.storage = _Server(self, "storage")

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT would be."""
        return f"http://127.0.0.1:{self.hub.port}"

    def bytes_served(self, file: str) -> int:
        """Bytes of the file's content that left either server."""
        return self._sent.get(file, 0)

    def ranges(self, file: str) -> list[tuple[int | None, int | None]]:
        """The ranges of the file that the storage was asked for, in order."""
        return [(r.begin, r.end) for r in self.requests if r.host == "storage" and r.file == file]

    def file_of(self, path: str) -> str | None:
        """The file that a request for `path` (unquoted) is about."""
        name = path.rsplit("/", 1)[-1]
        return name if name in self.contents else None

    def is_lfs(self, name: str) -> bool:
        """As in the releases: weights and the tokenizer."""
        return name.endswith(".safetensors") or name == "tokenizer.json"

    def count(self, file: str | None, sent: int) -> None:
        """Note bytes of a body that left."""
        with self._lock:
            self._sent[file] = self._sent.get(file, 0) + sent

    def answer(self, host: str, request: Request) -> Answer:
        """The answer to a request, faults applied."""
        with self._lock:
            self.requests.append(request)
        if host == "storage":
            kind, answer = "storage", self._content(request)
        elif request.path.startswith("/api/"):
            kind, answer = "api", self._api(request)
        else:
            kind, answer = "hub", self._resolve(request)
        self.faults.apply(kind, request.file, answer)
        return answer

    def _listed(self, name: str) -> dict[str, Any]:
        data = self.contents[name]
        found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob_id(data)}
        if self.is_lfs(name):
            sha256 = _hash("sha256", data)
            found["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return found

    def _api(self, request: Request) -> Answer:
        path = urllib.parse.urlsplit(request.path).path
        base = f"/api/models/{self.repo}"
        if not path.startswith(base):
            return Answer(404, {"X-Error-Code": "RepoNotFound"})
        if self.access == "private" and request.token != TOKEN:
            return Answer(401, {"X-Error-Message": "Invalid username or password."})
        action, _, quoted = path.removeprefix(base).strip("/").partition("/")
        commit = self._commit(urllib.parse.unquote(quoted or "main"))
        if commit is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if action == "tree":
            return _json([_tree_entry(listed) for listed in self.listing])
        return _json({"id": self.repo, "sha": commit, "siblings": self.listing})

    def _commit(self, revision: str) -> str | None:
        return revision if revision in (COMMIT, OLD_COMMIT) else self.revisions.get(revision)

    def _resolve(self, request: Request) -> Answer:
        match = re.fullmatch(rf"/{re.escape(self.repo)}/resolve/([^/]+)/([^/]+)", request.path)
        commit = self._commit(urllib.parse.unquote(match[1])) if match else None
        if self.access != "public" and request.token != TOKEN:
            return Answer(401 if request.token is None else 403, {"X-Error-Code": "GatedRepo"})
        if match is None or commit is None or (name := match[2]) not in self.contents:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        if not self.is_lfs(name):
            answer = self._content(request)
            blob = _blob_id(self.contents[name])
            answer.headers.update({"X-Repo-Commit": commit, "ETag": f'"{blob}"'})
            return answer
        sha256 = _hash("sha256", self.contents[name])
        signature = len(self.requests)
        return Answer(
            302,
            {
                "Location": f"http://127.0.0.1:{self.storage.port}/{name}?signature={signature}",
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(len(self.contents[name])),
                "X-Linked-Etag": f'"{sha256}"',
            },
            b"Found. Redirecting.",
        )

    def _content(self, request: Request) -> Answer:
        data = self.contents[request.file or ""]
        headers = {"ETag": f'"{_hash("md5", data)}-1"', "Accept-Ranges": "bytes"}
        if request.begin is None or request.end is None:
            return Answer(200, headers, data)
        if request.begin >= len(data):
            return Answer(416, headers)
        body = data[request.begin : request.end]
        headers["Content-Range"] = (
            f"bytes {request.begin}-{request.begin + len(body) - 1}/{len(data)}"
        )
        return Answer(206, headers, body)


@functools.lru_cache(256)  # content is hashed once, not at every request
def _hash(algorithm: str, data: bytes) -> str:
    return hashlib.new(algorithm, data).hexdigest()


def _blob_id(data: bytes) -> str:
    return _hash("sha1", b"blob %d\0" % len(data) + data)


def _tree_entry(listed: dict[str, Any]) -> dict[str, Any]:
    entry = {"type": "file", "path": listed["rfilename"], "size": listed["size"]}
    entry["oid"] = listed["blobId"]
    if "lfs" in listed:
        lfs = listed["lfs"]
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
    return entry


def _json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


class _Server:
    """One host on a port that stays its own, whether it is listening or not."""

    def __init__(self, owner: Loopback, host: str) -> None:
        self._connections: set[socket.socket] = set()
        self._handler = type(
            "Handler", (_Handler,), {"owner": owner, "host": host, "server_": self}
        )
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, from now on or again."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections and cut those that are open."""
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        """Note a connection."""
        self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget a connection."""
        self._connections.discard(connection)


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: Loopback
    host: str
    server_: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def setup(self) -> None:
        super().setup()
        self.server_.opened(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.server_.closed(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that leaves is no fault of ours
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_POST(self) -> None:
        self._serve(with_body=True)

    def do_PUT(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        request = self._request()
        answer = self.owner.answer(self.host, request)
        if answer.cut is None and answer.stall:
            time.sleep(answer.stall)
        if answer.framed:
            answer.headers["Transfer-Encoding"] = "chunked"
        else:
            length = self._promised(answer)
            answer.headers.setdefault("Content-Length", str(length))
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self._send(request, answer)

    def _promised(self, answer: Answer) -> int:
        """A right length for the range, even where a fault changed the body."""
        match = re.fullmatch(
            r"bytes (\d{1,9})-(\d{1,9})/\d+", answer.headers.get("Content-Range", "")
        )
        if match and answer.status == 206:
            return int(match[2]) - int(match[1]) + 1
        return len(answer.body)

    def _send(self, request: Request, answer: Answer) -> None:
        body = answer.body if answer.cut is None else answer.body[: answer.cut]
        if answer.status in (200, 206):
            self.owner.count(request.file, len(body))
        if answer.framed:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self.wfile.write(chunk + b"0\r\n\r\n")
        else:
            self.wfile.write(body)
        if answer.cut is not None:
            time.sleep(answer.stall)
        if answer.cut is not None or len(body) != len(answer.body):
            self.close_connection = True

    def _request(self) -> Request:
        path = urllib.parse.urlsplit(self.path).path
        begin = end = None
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(match[1]), int(match[2]) + 1 if match[2] else 1 << 62
        token = self.headers.get("Authorization")
        return Request(
            self.host,
            self.command,
            self.path,
            self.owner.file_of(urllib.parse.unquote(path)),
            begin,
            end,
            token.removeprefix("Bearer ") if token else None,
            self._body(),
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path, endpoint: str = NOWHERE) -> None:
    """In this process, `endpoint` is the hub, and login and cache are those of `home`.

    huggingface_hub reads its environment when it is imported, so that would be too late.
    """
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


@contextlib.contextmanager
def serve(
    directory: Path, *, repo: str = "some-org/some-model", access: str = "public"
) -> Iterator[Loopback]:
    """The files of `directory` as the repository `repo`, until the context ends.

    access: public; gated: files need TOKEN; private: the listing too.
    """
    loopback = Loopback(directory, repo, access)
    try:
        yield loopback
    finally:
        loopback.hub.stop()
        loopback.storage.stop()
