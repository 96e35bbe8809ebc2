"""A hub on this machine that takes uploads as huggingface_hub's client sends them.

Repositories have branches of commits, each a tree of files; large files go to the storage first. A
fault may be planted for an action (create, branch, preupload, batch, upload, verify, commit) as for
a file that is read. What the client does with the answers is the client's to say.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.convert.hub.loopback import TOKEN, Answer, Loopback, Request, _blob_id, _json

READER = "hf_reads_only"
REPO = "some-org/some-store"
_ACTIONS = "preupload|commit|branch"


class SharingHub(Loopback):
    """`trees`: commit -> path -> content. `branches`: name -> commit. `objects`: SHA-256 -> bytes.

    exists: whether the repository does; `private` as it was created.
    """

    def __init__(self, directory: Path, *, exists: bool = True, access: str = "public") -> None:
        self.trees: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.exists = exists
        self.private: bool | None = None
        self.uploaded: list[str] = []
        super().__init__(directory, REPO, access)
        if exists:
            self.commit_tree({".gitattributes": b"*.bin filter=lfs\n"})

    @property
    def head(self) -> dict[str, bytes]:
        """Path -> content, at the newest commit of main."""
        return self.trees[self.branches["main"]]

    def commit_tree(self, tree: dict[str, bytes], branch: str = "main") -> str:
        """A commit with these files; -> its name."""
        commit = hashlib.sha1(b"%d" % len(self.trees)).hexdigest()
        self.trees[commit] = dict(tree)
        self.branches[branch] = commit
        return commit

    def publish(self, directory: Path) -> str:
        """A commit with the files of a directory, as some other client pushed it."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        return self.commit_tree(files)

    def is_lfs(self, name: str) -> bool:
        """Data of arrays and the tokenizer."""
        return re.search(r"/c(/\d+)*$", name) is not None or name.endswith("tokenizer.json")

    def file_of(self, path: str) -> str | None:
        """The file, or the action, that a request is about."""
        if match := re.fullmatch(rf"/api/models/[^/]+/[^/]+/({_ACTIONS})/.+", path):
            return match[1]
        for end in ("create", "batch", "verify"):
            if path.endswith(f"/{end}"):
                return end
        if path.startswith("/upload/"):
            return "upload"
        match = re.fullmatch(rf"(?:/{re.escape(REPO)}/resolve)?/[0-9a-f]{{40}}/(.+)", path)
        return match[1] if match else None

    def _listed_at(self, commit: str) -> list[dict[str, Any]]:
        self.contents = self.trees[commit]
        return [self._listed(name) for name in sorted(self.contents)]

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.trees else self.branches.get(revision)

    def _api(self, request: Request) -> Answer:
        with self._lock:
            return self._locked_api(request)

    def _locked_api(self, request: Request) -> Answer:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        if request.method == "POST" and request.token != TOKEN:
            return Answer(403 if request.token else 401, {"X-Error-Message": "no right to write"})
        if path == "/api/validate-yaml":
            return _validated(json.loads(request.body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(request.body))
        if not self.exists or not path.startswith(f"/api/models/{REPO}"):
            return Answer(404, {"X-Error-Code": "RepoNotFound"})
        action, _, name = path.removeprefix(f"/api/models/{REPO}").strip("/").partition("/")
        if request.method == "GET":
            if self.access == "private" and request.token not in (TOKEN, READER):
                return Answer(401, {"X-Error-Message": "Invalid username or password."})
            commit = self._commit(name or "main")
            if commit is None:
                return Answer(404, {"X-Error-Code": "RevisionNotFound"})
            return _json({"id": REPO, "sha": commit, "siblings": self._listed_at(commit)})
        if action == "branch":
            self.branches.setdefault(name, self.branches["main"])
            return _json({})
        if name not in self.branches:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            return self._preupload(json.loads(request.body), name)
        return self._take_commit(request.body, name)

    def _create(self, asked: dict[str, Any]) -> Answer:
        url = {"url": f"{self.endpoint}/{asked['organization']}/{asked['name']}"}
        if self.exists:
            return Answer(409, {}, json.dumps(url | {"error": "you have it already"}).encode())
        self.exists, self.private = True, asked.get("visibility") == "private"
        self.commit_tree({".gitattributes": b"*.bin filter=lfs\n"})
        return _json(url)

    def _preupload(self, asked: dict[str, Any], branch: str) -> Answer:
        tree = self.trees[self.branches[branch]]
        files = []
        for file in asked["files"]:
            path, mode = file["path"], "lfs" if self.is_lfs(file["path"]) else "regular"
            oid = None
            if path in tree:
                sha256 = hashlib.sha256(tree[path]).hexdigest()
                oid = sha256 if mode == "lfs" else _blob_id(tree[path])
            found = {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            files.append(found)
        return _json({"files": files})

    def _take_commit(self, body: bytes, branch: str) -> Answer:
        tree = dict(self.trees[self.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    if value.get("parentCommit", self.branches[branch]) != self.branches[branch]:
                        return Answer(412, {"X-Error-Message": "A commit has happened since."})
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        return Answer(400, {"X-Error-Message": "an LFS object is missing"})
                    tree[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del tree[value["path"]]
        commit = self.commit_tree(tree, branch)
        url = f"{self.endpoint}/{REPO}/commit/{commit}"
        return _json({"success": True, "commitUrl": url, "commitOid": commit})

    def _resolve(self, request: Request) -> Answer:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return self._batch(request)
        if path.endswith("/verify"):
            return _json({})
        match = re.fullmatch(rf"/{re.escape(REPO)}/resolve/([^/]+)/(.+)", path)
        commit = self._commit(match[1]) if match else None
        if self.access != "public" and request.token not in (TOKEN, READER):
            return Answer(401 if request.token is None else 403, {"X-Error-Code": "GatedRepo"})
        if match is None or commit is None or (name := match[2]) not in self.trees[commit]:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        data = self.trees[commit][name]
        if not self.is_lfs(name):
            answer = self._bytes(request, data)
            answer.headers["ETag"] = f'"{_blob_id(data)}"'
            return answer
        place = urllib.parse.quote(f"/{commit}/{name}")
        return Answer(
            302,
            {
                "Location": f"http://127.0.0.1:{self.storage.port}{place}?signature=1",
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            },
            b"Found. Redirecting.",
        )

    def _batch(self, request: Request) -> Answer:
        if request.token != TOKEN:
            return Answer(403 if request.token else 401, {"X-Error-Message": "no right to write"})
        found = []
        for one in json.loads(request.body)["objects"]:
            oid = one["oid"]
            if oid not in self.objects:
                upload = f"http://127.0.0.1:{self.storage.port}/upload/{oid}"
                verify = f"{self.endpoint}/{REPO}.git/info/lfs/verify"
                one["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            found.append(one)
        return _json({"transfer": "basic", "objects": found})

    def _content(self, request: Request) -> Answer:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        if request.method == "PUT":
            oid = path.rsplit("/", 1)[-1]
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Answer(400, {}, b"not this object")
            self.objects[oid] = request.body
            self.uploaded.append(oid)
            return Answer(200)
        commit, _, name = path.strip("/").partition("/")
        return self._bytes(request, self.trees[commit][name])

    def _bytes(self, request: Request, data: bytes) -> Answer:
        headers = {"Accept-Ranges": "bytes", "ETag": '"of-the-storage"'}
        if request.begin is None or request.end is None:
            return Answer(200, headers, data)
        body = data[request.begin : request.end]
        last = request.begin + len(body) - 1
        headers["Content-Range"] = f"bytes {request.begin}-{last}/{len(data)}"
        return Answer(206, headers, body)


def _validated(content: str) -> Answer:
    """As the hub checks the front matter of a card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        found = str(error)
    if not isinstance(found, dict):
        return Answer(400, {}, json.dumps({"errors": [{"message": "no metadata"}]}).encode())
    return _json({"errors": [], "warnings": []})


@contextlib.contextmanager
def sharing_hub(
    scratch: Path, *, exists: bool = True, access: str = "public"
) -> Iterator[SharingHub]:
    """It runs until the context ends."""
    scratch.mkdir(parents=True, exist_ok=True)
    hub = SharingHub(scratch, exists=exists, access=access)
    try:
        yield hub
    finally:
        hub.hub.stop()
        hub.storage.stop()
