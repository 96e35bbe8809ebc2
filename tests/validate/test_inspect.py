"""`dsv4 inspect`: sizes, origins, first blocks, and what differs between two stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.validate.diff import diff
from dsv4.validate.inspect import tensor, tree
from tests.support.oracles import stored_tensors


def _inspect(*args: object, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["inspect", *map(str, args), "--json"])
    assert done.exit_code == code, done.output
    shown = CliRunner().invoke(cli, ["inspect", *map(str, args)])
    assert shown.exit_code == code
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_tree_has_every_byte_and_every_tensor(standard_store: Path) -> None:
    document = _inspect(standard_store)
    packed = dsv4.open(standard_store)
    assert list(document["tensors"]) == packed.names()
    assert document["bytes"] == sum(f.nbytes for f in packed.store.files_under(None))
    assert document["bytes"] == sum(part["bytes"] for part in document["parts"].values())
    layer = document["parts"]["layers.2"]
    assert layer["bytes"] == sum(f.nbytes for f in packed.store.files_under("layers/2"))
    assert layer["formats"]["nvfp4"] == 25
    assert sum(part["tensors"] for part in document["parts"].values()) == len(packed.names())


@pytest.mark.parametrize("projection", ["w1", "w3", "w2"])
@pytest.mark.parametrize("expert", [0, 5])
def test_the_first_block_is_the_sources(
    tiny_source: Path, standard_store: Path, expert: int, projection: str
) -> None:
    name = f"layers.2.ffn.experts.{expert}.{projection}.weight"
    block = _inspect(standard_store, name)["first_block"]
    raw = stored_tensors(tiny_source)[name].view(torch.uint8)[0, :8].tolist()
    assert block["codes"] == [nibble for byte in raw for nibble in (byte & 15, byte >> 4)]
    assert bytes.fromhex(block["bytes"]) == bytes(raw)
    with (standard_store / block["file"]).open("rb") as file:
        file.seek(block["offset"])
        assert file.read(8) == bytes(raw)
    assert block["values"] == dsv4.open(standard_store).dequantize(name)[0, :16].tolist()


@pytest.mark.parametrize("name", ["layers.0.attn.wq_b.weight", "head.weight", "norm.weight"])
def test_every_format_has_a_first_block(standard_store: Path, name: str) -> None:
    facts = _inspect(standard_store, name)
    values = dsv4.open(standard_store).dequantize(name).reshape(-1)[:16].tolist()
    assert facts["first_block"]["values"] == values
    assert facts["transforms"]
    for place in facts["sources"].values():
        assert len(place["sha256"]) == 64


def test_a_source_on_the_hub_is_named_with_its_commit(standard_store: Path) -> None:
    packed = dsv4.open(standard_store)
    commit = "0123456789abcdef0123456789abcdef01234567"
    packed.store.manifest["origin"].update(kind="hub", repo="org/name", commit=commit)
    expected = {"kind": "hub", "repo": "org/name", "commit": commit}
    assert tensor(packed, "norm.weight")["source"] == tree(packed)["source"] == expected


def test_equal_stores_do_not_differ(standard_store: Path, tmp_path: Path) -> None:
    shutil.copytree(standard_store, tmp_path / "copy")
    document = _inspect(standard_store, "--diff", tmp_path / "copy")
    assert document["same"]
    assert document["differences"] == []


def test_recipes_differ_in_the_rounded_tensors(native_store: Path, standard_store: Path) -> None:
    document = _inspect(native_store, "--diff", standard_store, code=1)
    found = document["differences"]
    assert not document["same"]
    assert {d["path"] for d in found if d["kind"] == "section"} == {"recipe"}
    named = {name for d in found for name in d["names"]}
    native, standard = dsv4.open(native_store), dsv4.open(standard_store)
    rounded = {n for n in native.names() if native.format_of(n) != standard.format_of(n)}
    assert named == rounded
    assert len(rounded) == 8
    assert {d["what"] for d in found if d["names"]} == {"only in A", "only in B"}


def test_another_byte_is_found_by_expert(tiny_source: Path, tmp_path: Path) -> None:
    from dsv4.convert.sources.local import LocalSource

    other = Path(shutil.copytree(tiny_source, tmp_path / "hub"))
    entry = LocalSource(other).entries["layers.2.ffn.experts.5.w3.weight"]
    raw = bytearray((other / entry.file).read_bytes())
    raw[entry.begin] ^= 0x11
    (other / entry.file).write_bytes(raw)
    for source, out in ((tiny_source, "a"), (other, "b")):
        dsv4.convert(source, tmp_path / out, recipe="native")
    a, b = (dsv4.open(tmp_path / out) for out in "ab")
    (array,) = [d for d in diff(a, b) if d.kind == "array"]
    assert array.path == "layers/2/ffn/experts/w13/codes"
    assert array.what == "1 of 8 chunks, experts 5"
    assert array.names == tuple(f"layers.2.ffn.experts.{{e}}.{w}.weight" for w in ("w1", "w3"))
    assert {d.path for d in diff(a, b) if d.kind == "section"} == {"source"}
    assert diff(b, a)[0].what == diff(a, b)[0].what


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("norm.weight", "--diff", "."), "TENSOR and --diff exclude each other"),
        (("--list", "--diff", "."), "--list and --diff exclude each other"),
        (("",), "the name of TENSOR is empty"),
    ],
)
def test_what_excludes_each_other(
    standard_store: Path, more: tuple[str, ...], sentence: str
) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(standard_store), *more])
    assert done.exit_code == 2
    assert sentence in done.output
