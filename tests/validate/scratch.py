"""A copy of a store that is damaged, sealed again as an attacker would, and put right."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.formats.numeric.layouts import pack_nvfp4, unpack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import Nvfp4Matrix
from dsv4.formats.store.digest import XXH3_BYTES
from dsv4.formats.store.file_digest import FileDigest
from dsv4.formats.store.manifest import FileRecord, content_root
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import MARKER, NODE_DOCUMENT
from dsv4.formats.store.zarr_json import descriptions, parse_root

Json = dict[str, Any]
Edit = Callable[[Json, Json], object]
"""Changes the manifest and the nodes (path -> document)."""


class Scratch:
    """root: the copy. store: the pristine one, open."""

    def __init__(self, pristine: Path, root: Path) -> None:
        self.root = Path(shutil.copytree(pristine, root))
        self.store = PackedStore.open(pristine)
        self.pristine = pristine
        self.keys = sorted(p.relative_to(pristine).as_posix() for p in _files(pristine))
        self.touched: set[str] = set()

    def read(self, key: str) -> bytearray:
        return bytearray((self.root / key).read_bytes())

    def write(self, key: str, raw: bytes) -> None:
        self.touched.add(key)
        (self.root / key).write_bytes(raw)

    def remove(self, key: str) -> None:
        self.touched.add(key)
        (self.root / key).unlink()

    def restore(self) -> None:
        """As it was."""
        for key in self.touched:
            (self.root / key).unlink(missing_ok=True)
            if (self.pristine / key).exists():
                shutil.copyfile(self.pristine / key, self.root / key)
        self.touched.clear()

    def poke(self, key: str, offset: int, values: bytes) -> None:
        """Overwrite bytes."""
        raw = self.read(key)
        raw[offset : offset + len(values)] = values
        self.write(key, bytes(raw))

    def seal(self, edit: Edit | None = None) -> None:
        """Make every checksum, the Merkle root and the marker fit, after an edit of metadata."""
        document = json.loads(self.read(NODE_DOCUMENT))
        manifest = document["attributes"]["dsv4"]
        nodes = document["consolidated_metadata"]["metadata"]
        for key in self.touched & manifest["files"].keys():
            if (self.root / key).exists():
                manifest["files"][key] = _record(manifest["files"][key], bytes(self.read(key)))
        before = {path: json.dumps(node) for path, node in nodes.items()}
        if edit is not None:
            edit(manifest, nodes)
        self.put(document)
        for path in before.keys() - nodes.keys():
            self.remove(f"{path}/{NODE_DOCUMENT}")
        for path, node in nodes.items():
            if before.get(path) != json.dumps(node):
                own = {key: value for key, value in node.items() if key != "consolidated_metadata"}
                self.write(f"{path}/{NODE_DOCUMENT}", json.dumps(own).encode())

    def put(self, document: Json, *, root: bool = True) -> None:
        """Write the root's document and the marker that pins it; `root`: with its own root."""
        manifest = document["attributes"]["dsv4"]
        if root:
            hierarchy = parse_root(json.dumps(document).encode())
            records = {k: FileRecord.from_json(k, raw) for k, raw in manifest["files"].items()}
            nodes = descriptions(hierarchy.groups, hierarchy.arrays)
            manifest["root"] = content_root(manifest, nodes, records)
        raw = json.dumps(document).encode()
        marker = json.loads(self.read(MARKER))
        marker |= {"root": manifest["root"], "metadata_sha256": hashlib.sha256(raw).hexdigest()}
        self.write(NODE_DOCUMENT, raw)
        self.write(MARKER, json.dumps(marker).encode())

    def key(self, path: str) -> str:
        """The one file of an array."""
        (file,) = self.store.array(path).spec.files()
        return file.key

    def matrix(self, path: str, expert: int | None) -> Nvfp4Matrix:
        """An NVFP4 matrix as it was packed."""
        if expert is None:
            found = self.store.matrix(f"{path.replace('/', '.')}.weight")
        else:
            found = self.store.stack(self.store.contents.stacks[path]).matrix(expert)
        assert isinstance(found, Nvfp4Matrix)
        return found

    def repack(
        self,
        path: str,
        expert: int | None,
        change: Callable[[list[NVFP4Tensor]], list[NVFP4Tensor]],
        source_expert: int | None = None,
    ) -> None:
        """Pack what `change` makes of a matrix (or of another expert's) in its place."""
        old = self.matrix(path, expert if source_expert is None else source_expert)
        parts = change(unpack_nvfp4(old))
        self.place(path, expert, pack_nvfp4(parts, slabs=len(old.codes), interleave=old.interleave))

    def place(self, path: str, expert: int | None, matrix: Nvfp4Matrix) -> None:
        """Write an NVFP4 matrix over one that is there."""
        for member, tensor in (
            ("codes", matrix.codes),
            ("scales", matrix.scales),
            ("global_scale", matrix.global_scales),
        ):
            raw = tensor.contiguous().numpy().tobytes()
            self.poke(self.key(f"{path}/{member}"), (expert or 0) * len(raw), raw)


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def _record(old: Json, raw: bytes) -> Json:
    """The manifest's entry of a file that now holds `raw`."""
    payload = len(base64.b64decode(old["xxh3"])) // XXH3_BYTES * old["chunk_bytes"]
    if not payload or len(raw) < payload or old["bytes"] == payload:
        payload = len(raw)  # an asset of any size
    chunk = old["chunk_bytes"] if len(raw) == old["bytes"] else len(raw)
    checksums = FileDigest(chunk)
    checksums.payload(memoryview(raw)[:payload])
    checksums.index(raw[payload:])
    blake3, xxh3 = checksums.finish()
    return FileRecord(len(raw), blake3, chunk, xxh3).to_json()
