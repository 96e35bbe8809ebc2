"""Metadata written by an attacker (marker hash made to fit): refused by name, never a traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4.formats.errors import StoreError
from dsv4.formats.store.integrity import check_root, verify
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.zarr_json import parse_root
from tests.formats.store import packing

Document = dict[str, Any]
Edit = Callable[[Document], Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hostile") / "packed"
    packing.write(out)
    return out


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "packed"))


def _nodes(document: Document) -> Document:
    nodes: Document = document["consolidated_metadata"]["metadata"]
    return nodes


def _manifest(document: Document) -> Document:
    manifest: Document = document["attributes"]["dsv4"]
    return manifest


def _array(path: str, **fields: Any) -> Edit:
    return lambda document: _nodes(document)[path].update(fields)


def _codec(path: str, **fields: Any) -> Edit:
    return lambda document: _nodes(document)[path]["codecs"][0]["configuration"].update(fields)


def _own(path: str, **fields: Any) -> Edit:
    return lambda document: _nodes(document)[path]["attributes"]["dsv4"].update(fields)


def _section(name: str, value: Any) -> Edit:
    return lambda document: _manifest(document).update({name: value})


def _record(key: str, **fields: Any) -> Edit:
    return lambda document: _manifest(document)["files"][key].update(fields)


def _drop(path: str) -> Edit:
    """Remove a node, and with an array its file."""

    def edit(document: Document) -> None:
        del _nodes(document)[path]
        files = _manifest(document)["files"]
        for key in [key for key in files if key.startswith(f"{path}/c/")]:
            del files[key]

    return edit


def _rename(old: str, new: str) -> Edit:
    """Move a node, and with an array its file."""

    def edit(document: Document) -> None:
        _nodes(document)[new] = _nodes(document).pop(old)
        files = _manifest(document)["files"]
        for key in [key for key in files if key.startswith(f"{old}/c/")]:
            files[new + key.removeprefix(old)] = files.pop(key)

    return edit


def _both(*edits: Edit) -> Edit:
    return lambda document: [edit(document) for edit in edits]


def _move_file(old: str, new: str) -> Edit:
    def edit(document: Document) -> None:
        files = _manifest(document)["files"]
        files[new] = files.pop(old)

    return edit


def _grid(*shape: Any) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


NORM, EMBED, TABLE = "norm/weight", "embed/weight", "layers/0/ffn/gate/tid2eid"
WO_B, W13, W2, WQ_A = (
    "layers/0/attn/wo_b",
    "layers/0/ffn/experts/w13",
    "layers/0/ffn/experts/w2",
    "layers/0/attn/wq_a",
)
NVFP4 = "nvfp4.kmajor.sf32x4x4"

HOSTILE: dict[str, tuple[str, Edit]] = {
    # the document
    "a list": ("no JSON object", lambda d: [d]),
    "no attributes": ("no Zarr v3 group", lambda d: d.pop("attributes")),
    "zarr 2": ("no Zarr v3 group", lambda d: d.update(zarr_format=2)),
    "an array as root": ("no Zarr v3 group", lambda d: d.update(node_type="array")),
    "extra key": ("no Zarr v3 group", lambda d: d.update(extension={"must_understand": True})),
    "foreign attributes": ("no dsv4 manifest", lambda d: d["attributes"].update(other=1)),
    "no manifest": ("no dsv4 manifest", lambda d: d["attributes"].clear()),
    "manifest is a list": ("no dsv4 manifest", lambda d: d["attributes"].update(dsv4=[])),
    "not consolidated": ("consolidated", lambda d: d.pop("consolidated_metadata")),
    "nodes are a list": ("consolidated", lambda d: d["consolidated_metadata"].update(metadata=[])),
    "other consolidation": ("consolidated", lambda d: d["consolidated_metadata"].update(kind="x")),
    # the manifest
    "format version 1": ("format version 1", _section("format_version", 1)),
    "format version 3.0": ("format version 3.0", _section("format_version", 3.0)),
    "format version true": ("format version True", _section("format_version", True)),
    "unknown layout": ("layouts.*nvfp4.other", _section("layouts", {"nvfp4.other": {}})),
    "layouts as list": ("layouts", _section("layouts", [NVFP4])),
    "no config": ("config", lambda d: _manifest(d).pop("config")),
    "config as list": ("config", _section("config", [])),
    "config of another version": ("unknown fields", _section("config", {"novel": 1})),
    "recipe as text": ("recipe is 'standard', expected a name", _section("recipe", "standard")),
    "recipe without globs": ("recipe is", _section("recipe", {"name": "x"})),
    "globs as a number": ("recipe is", _section("recipe", {"name": "x", "keep": 5})),
    "a number as glob": ("recipe is", _section("recipe", {"name": "x", "keep": [5]})),
    "a recipe that colours": (
        r"recipe is .*\\x1b\[31mred",
        _section("recipe", {"name": "\x1b[31mred", "keep": []}),
    ),
    "a glob that colours": (
        r"recipe is .*\\x1b\[31m",
        _section("recipe", {"name": "x", "keep": ["\x1b[31m"]}),
    ),
    "a tool that names the window": (
        r"tool is '\\x1b\]0;evil",
        _section("tool", "\x1b]0;evil\x07"),
    ),
    "a tool in a list": ("tool is", _section("tool", ["dsv4"])),
    "config incomplete": ("incomplete", _section("config", {"vocab_size": 1})),
    "config with zero groups": (
        "manifest",
        lambda d: _manifest(d)["config"].update(o_groups=False),
    ),
    "config with text": ("manifest", lambda d: _manifest(d)["config"].update(head_dim="x")),
    "source files as text": ("the file 'x'", _section("source", {"files": "x"})),
    "a source file without hash": (
        "expected a printable name",
        _section("source", {"files": [{"name": "a.safetensors", "bytes": 1}]}),
    ),
    "a source file that colours": (
        r"the file .*\\x1b\[31m",
        _section("source", {"files": [{"name": "\x1b[31m", "bytes": 1, "sha256": "a" * 64}]}),
    ),
    "source as list": ("source", _section("source", [])),
    "source with an origin": (
        "source has other members",
        lambda d: _manifest(d)["source"].update(kind="local"),
    ),
    "no origin": ("origin is None", lambda d: _manifest(d).pop("origin")),
    "origin as list": ("origin is", _section("origin", [])),
    "origin without kind": ("origin is", _section("origin", {})),
    "unknown origin": ("origin is", _section("origin", {"kind": "ftp"})),
    "origin of a list": ("origin is", _section("origin", {"kind": ["hub"]})),
    "origin with more": ("origin has members", _section("origin", {"kind": "local", "path": "/"})),
    "hub origin with more": (
        "origin has members",
        _section("origin", {"kind": "hub", "repo": "a/b", "commit": "c" * 40, "url": "http://x"}),
    ),
    "hub origin without commit": (
        "origin has the commit None",
        _section("origin", {"kind": "hub", "repo": "a/b"}),
    ),
    "hub origin at a branch": (
        "origin has the commit 'main'",
        _section("origin", {"kind": "hub", "repo": "a/b", "commit": "main"}),
    ),
    "hub origin that is a path": (
        "origin has the repo '../b'",
        _section("origin", {"kind": "hub", "repo": "../b", "commit": "c" * 40}),
    ),
    "another root": ("claims root", _section("root", "0" * 64)),
    "no root": ("claims root", lambda d: _manifest(d).pop("root")),
    "root no text": ("claims root", _section("root", 7)),
    # files
    "files as list": ("files", _section("files", [])),
    "no files": ("lists 0 files", _section("files", {})),
    "a file less": ("lists", lambda d: _manifest(d)["files"].pop("norm/weight/c/0")),
    "a file more": (
        "lists",
        lambda d: _manifest(d)["files"].update(x=_manifest(d)["files"]["norm/weight/c/0"]),
    ),
    "escaping file": ("not listed", _move_file("norm/weight/c/0", "../../etc/passwd")),
    "absolute file": ("not listed", _move_file("norm/weight/c/0", "/etc/passwd")),
    "escaping asset": ("asset name", _move_file("assets/LICENSE", "assets/../../x")),
    "nested asset": ("asset name", _move_file("assets/LICENSE", "assets/a/b")),
    "asset as node": ("asset name", _move_file("assets/LICENSE", "assets/zarr.json")),
    "entry as list": (
        "malformed",
        lambda d: _manifest(d)["files"].update({"norm/weight/c/0": []}),
    ),
    "entry with more": ("malformed", _record("norm/weight/c/0", url="http://x")),
    "wrong size": ("expected", _record("norm/weight/c/0", bytes=4096)),
    "negative size": ("size -1", _record("assets/LICENSE", bytes=-1)),
    "size as text": ("size '512'", _record("norm/weight/c/0", bytes="512")),
    "size as bool": ("size True", _record("assets/LICENSE", bytes=True)),
    "huge asset": ("expected", _record("assets/LICENSE", bytes=1 << 62)),
    "wrong chunk size": ("expected", _record("norm/weight/c/0", chunk_bytes=8)),
    "short blake3": ("checksums", _record("norm/weight/c/0", blake3="00")),
    "blake3 no text": ("checksums", _record("norm/weight/c/0", blake3=None)),
    "too few digests": ("expected", _record("embed/weight/c/0/0", xxh3="AAAAAAAAAAA=")),
    "digests no text": ("checksums", _record("norm/weight/c/0", xxh3=7)),
    # nodes
    "escaping node": ("node path", _rename(NORM, "../../etc")),
    "absolute node": ("node path", _rename(NORM, "/etc/x")),
    "dotted node": ("node path", _rename(NORM, "norm/./weight")),
    "empty component": ("node path", _rename(NORM, "norm//weight")),
    "node with NUL": ("node path", _rename(NORM, "norm/we\0ight")),
    "node in assets": ("reserved", _rename(NORM, "assets/weight")),
    "long node": ("node path", _rename(NORM, "a/" * 300 + "b")),
    "orphan": ("parent group norm is missing", lambda d: _nodes(d).pop("norm")),
    "array in array": ("contains others", _rename("hc_head_scale", "norm/weight/c")),
    "node as list": ("no array", lambda d: _nodes(d).update({NORM: []})),
    "node as text": ("no array", lambda d: _nodes(d).update({NORM: "x"})),
    "node as null": ("no array", lambda d: _nodes(d).update({NORM: None})),
    "group with children": (
        "no Zarr v3 group",
        lambda d: _nodes(d)["norm"]["consolidated_metadata"]["metadata"].update(x={}),
    ),
    "group with extra key": ("no Zarr v3 group", _array("norm", extra=1)),
    "group attributes as list": ("no Zarr v3 group", _array("norm", attributes=[])),
    # arrays
    "no shape": ("no array", lambda d: _nodes(d)[NORM].pop("shape")),
    "shape as number": ("no list", _array(NORM, shape=256)),
    "shape with bool": ("integers", _array("hc_head_scale", shape=[True])),
    "shape with float": ("integers", _array(NORM, shape=[256.0])),
    "negative shape": ("positive", _array(NORM, shape=[-256])),
    "zero shape": ("positive", _array(NORM, shape=[0])),
    "overflowing shape": (
        "limit",
        _array(NORM, shape=[1 << 40, 1 << 40], chunk_grid=_grid(1, 1 << 40)),
    ),
    "astronomic shape": ("positive", _array(NORM, shape=[10**30], chunk_grid=_grid(10**30))),
    "a million files": (
        "at most",
        _both(
            _array(EMBED, shape=[1 << 20, 256], chunk_grid=_grid(1, 256)),
            _codec(EMBED, chunk_shape=[1, 256]),
        ),
    ),
    "chunk not dividing": ("divide", _array(NORM, chunk_grid=_grid(100))),
    "shard splits columns": (
        "dimension 0",
        _both(_array(EMBED, chunk_grid=_grid(32, 128)), _codec(EMBED, chunk_shape=[8, 128])),
    ),
    "inner chunk not dividing": ("divide", _codec(EMBED, chunk_shape=[7, 256])),
    "inner chunk zero": ("positive", _codec(EMBED, chunk_shape=[0, 256])),
    "inner chunk rank": ("rank", _codec(EMBED, chunk_shape=[256])),
    "index at start": ("unexpected codecs", _codec(EMBED, index_location="start")),
    "compressed index": (
        "unexpected codecs",
        _codec(EMBED, index_codecs=[{"name": "gzip"}]),
    ),
    "compressed chunks": ("unexpected codecs", _codec(EMBED, codecs=[{"name": "zstd"}])),
    "compressed array": (
        "unexpected codecs",
        lambda d: _nodes(d)[NORM]["codecs"].append({"name": "zstd"}),
    ),
    "transposed array": (
        "unexpected codecs",
        lambda d: _nodes(d)[NORM]["codecs"].insert(0, {"name": "transpose"}),
    ),
    "big endian": ("unexpected codecs", _codec(NORM, endian="big")),
    "no codecs": ("no array", _array(NORM, codecs=[])),
    "other fill value": ("unexpected fill_value", _array(NORM, fill_value=1)),
    "other data type": ("unexpected data_type", _array(NORM, data_type="float16")),
    "other keys": (
        "unexpected chunk_key_encoding",
        _array(NORM, chunk_key_encoding={"name": "v2"}),
    ),
    "other grid": ("unexpected chunk_grid", _array(NORM, chunk_grid=_grid(256) | {"name": "odd"})),
    "storage transformer": ("unexpected storage", _array(NORM, storage_transformers=[{}])),
    "dimension names": ("unexpected dimension_names", _array(NORM, dimension_names=["x"])),
    "zarr 2 array": ("unexpected zarr_format", _array(NORM, zarr_format=2)),
    "unknown element": ("element", _own(NORM, element="float16")),
    "element as list": ("element", _own(NORM, element=["bfloat16"])),
    "element of another type": ("unexpected data_type", _own(NORM, element="float32")),
    "no element": ("no array", lambda d: _nodes(d)[NORM]["attributes"]["dsv4"].pop("element")),
    # meaning
    "nameless array": ("plain tensor", _own(NORM, names=[])),
    "names as text": ("plain tensor", _own(NORM, names="norm.weight")),
    "two names": ("plain tensor", _own(NORM, names=["a", "b"])),
    "hostile name": ("refused", _own(NORM, names=["../norm"])),
    "name no text": ("refused", _own(NORM, names=[7])),
    "name taken": ("stored twice", _own(NORM, names=["embed.weight"])),
    "name of a matrix": ("stored twice", _own(NORM, names=["head.weight"])),
    "exact as text": ("exact", _own(NORM, exact="yes")),
    "unknown format": ("unknown", _own(WO_B, format="int3")),
    "format as list": ("unknown", _own(WO_B, format=["nvfp4"])),
    "unknown layout id": ("unknown", _own(WO_B, layout="nvfp4.nmajor")),
    "layout of another format": ("unknown", _own(WO_B, layout="fp8.block128")),
    "fp8 as nvfp4": ("expected", _own(WQ_A, format="nvfp4", layout=NVFP4)),
    "unknown parameter": ("parameters", _own(WO_B, parameters={"slabs": 4, "swizzle": 2})),
    "no slabs": ("slabs", _own(WO_B, parameters={})),
    "zero slabs": ("slabs is 0", _own(WO_B, parameters={"slabs": 0})),
    "bool slabs": ("slabs is True", _own("head", parameters={"slabs": True})),
    "two slabs for four": ("slabs", _own(WO_B, parameters={"slabs": 2})),
    "slabs off the grid": ("slabs", _own(WO_B, parameters={"slabs": 8})),
    "interleave without partner": (
        "interleave",
        _own(WO_B, parameters={"slabs": 4, "interleave": 8}),
    ),
    "partner without interleave": ("interleave", _own(W13, parameters={"slabs": 1})),
    "negative interleave": ("interleave", _own(W13, parameters={"slabs": 1, "interleave": -8})),
    "other rows": ("expected", _own(WO_B, shape=[128, 256])),
    "other columns": ("expected", _own(WO_B, shape=[256, 512])),
    "shape as text": ("shape", _own(WO_B, shape="256")),
    "shape of three": ("shape", _own(WO_B, shape=[1, 256, 256])),
    "huge logical shape": ("shape", _own(WO_B, shape=[1 << 60, 256])),
    "three names": ("names", _own(W13, names=["a.{e}", "b.{e}", "c.{e}"])),
    "stack without template": ("expected one component", _own(W2, names=["a.b.c"])),
    "two templates": ("expected one component", _own(W2, names=["a.{e}.{e}"])),
    "template in a word": ("expected one component", _own(W2, names=["a.x{e}"])),
    "stack names twice": (
        "same expert names",
        _own(W2, names=["layers.0.ffn.experts.{e}.w1.weight"]),
    ),
    "no codes": ("no quantised matrix", _drop(f"{WO_B}/codes")),
    "no scales": ("scales is missing", _drop(f"{WO_B}/scales")),
    "no global scale": ("global_scale is missing", _drop(f"{WO_B}/global_scale")),
    "codes as e4m3": ("e2m1x2", _own(f"{WO_B}/codes", element="e4m3")),
    "stray member": ("plain tensor", _rename(f"{W13}/lineage", f"{W13}/extra")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata(store: Path, case: str) -> None:
    pattern, edit = HOSTILE[case]
    before = (store / "zarr.json").read_bytes()

    def apply(document: Document) -> Any:
        replaced = edit(document)
        return replaced if isinstance(replaced, list) and case == "a list" else None

    packing.edit_metadata(store, apply)
    assert (store / "zarr.json").read_bytes() != before
    with pytest.raises(StoreError, match=pattern) as caught:
        PackedStore.open(store)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


RAW = {
    "empty": b"",
    "not utf-8": b"\xff{}",
    "truncated": b'{"attributes": {',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "infinity": b'{"attributes": Infinity}',
    "nan": b"NaN",
    "number": b"7",
    "big number": b"1" * 10_000,
}


@pytest.mark.parametrize("case", RAW)
def test_malformed_json(store: Path, case: str) -> None:
    packing.put_metadata(store, RAW[case])
    with pytest.raises(StoreError, match=r"zarr\.json"):
        PackedStore.open(store)


def test_the_editor_itself_is_harmless(store: Path) -> None:
    """So that what the cases above see refused is their edit."""
    packing.edit_metadata(store, lambda document: None)
    verify(PackedStore.open(store))


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.text(max_size=4) | st.just(0.5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_random_edits_are_refused_or_change_the_root(pristine: Path, data: st.DataObject) -> None:
    """Whatever one value of the metadata becomes: StoreError, or the Merkle root tells."""
    original = json.loads((pristine / "zarr.json").read_bytes())
    document = copy.deepcopy(original)
    parent, key = document, "attributes"
    while True:
        child = parent[key]
        if not isinstance(child, dict | list) or not child or data.draw(st.integers(0, 5)) == 0:
            break
        keys = sorted(child) if isinstance(child, dict) else list(range(len(child)))
        parent, key = child, data.draw(st.sampled_from(keys))
        if parent is document["attributes"] and data.draw(st.booleans()):
            parent, key = document["consolidated_metadata"], "metadata"
    parent[key] = data.draw(_JUNK)
    if json.dumps(document, sort_keys=True) == json.dumps(original, sort_keys=True):
        return
    try:
        store = PackedStore(pristine, parse_root(json.dumps(document).encode()), verify=True)
    except StoreError:
        return
    if store.manifest["root"] != original["attributes"]["dsv4"]["root"]:
        return  # refused by open: the marker says otherwise
    for one in (original, document):  # the root leaves it open
        one["attributes"]["dsv4"].pop("origin", None)
    if not _only_spelling(original, document):
        with pytest.raises(StoreError, match="altered"):
            check_root(store)


def _only_spelling(a: Any, b: Any) -> bool:
    """Whether two documents differ only as Python's 0 == 0.0 == False does."""
    return bool(a == b)
