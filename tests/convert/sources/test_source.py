"""A local checkpoint: every tensor as the safetensors library reads it, every defect refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dsv4.convert.sources.base import INDEX_FILE, Source
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import FormatError, SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.source_inventory import check_inventory
from dsv4.synthetic.tiny import HF_TINY, ODD, write_tiny
from tests.support.oracles import stored_tensors

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "checkpoint"
    write_tiny(out, HF_TINY)
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def hashes(source: LocalSource) -> dict[str, str]:
    """SHA-256 of every shard, read as a stream."""
    found = {}
    for name, size in source.sizes.items():
        view = memoryview(bytearray(size))
        with source.stream(name) as stream:
            stream.readinto(view[:1])
            stream.readinto(view[1:])
        found[name] = hashlib.sha256(view).hexdigest()
    return found


def description(source: LocalSource) -> dict[str, Any]:
    return source.description(hashes(source))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_reads_what_the_library_reads(checkpoint: Path) -> None:
    source: Source = LocalSource(checkpoint)
    expected = stored_tensors(checkpoint)
    assert source.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        entry = source.entries[name]
        assert same_bytes(source.read(entry), tensor), name
        stop = tensor.shape[0]
        for begin, end in ((0, stop), (0, 1), (stop // 2, stop), (stop, stop)):
            assert same_bytes(source.read_rows(entry, begin, end), tensor[begin:end]), name
    assert {e.dtype for e in source.entries.values()} == {"BF16", "F32", "F8_E4M3", "F8_E8M0", "I8"}


def test_scalars_and_empty_tensors_are_read(copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    tensors = {"s": torch.tensor(2.5), "e": torch.empty(0, 3), "t": torch.arange(5)}
    (copy / "extra.safetensors").write_bytes(save(tensors))
    source = LocalSource(copy)
    for name, tensor in tensors.items():
        assert same_bytes(source.read(source.entries[name]), tensor)
    with pytest.raises(FormatError, match="s has shape \\[\\], which has no rows 0:1"):
        source.read_rows(source.entries["s"], 0, 1)
    for start, stop in ((0, 6), (-1, 2), (3, 2)):
        with pytest.raises(FormatError, match=r"t has shape \[5\], which has no rows"):
            source.read_rows(source.entries["t"], start, stop)


def test_many_threads_read_at_once(checkpoint: Path) -> None:
    source = LocalSource(checkpoint)
    expected = stored_tensors(checkpoint)
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda name: (name, source.read(source.entries[name])), [*expected] * 4)
        assert all(same_bytes(tensor, expected[name]) for name, tensor in read)


def test_the_index_is_optional(copy: Path) -> None:
    with_index = LocalSource(copy).entries
    (copy / INDEX_FILE).unlink()
    source = LocalSource(copy)
    assert source.entries == with_index
    check_inventory(source.entries, ModelConfig.from_hf(source.config))


def test_a_snapshot_of_links_into_blobs_is_read(checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    linked, plain = LocalSource(snapshot), LocalSource(checkpoint)
    assert linked.entries == plain.entries
    assert description(linked) == description(plain)
    entry = linked.entries["embed.weight"]
    assert same_bytes(linked.read(entry), plain.read(entry))
    (blobs / hashlib.sha256((checkpoint / SHARD).read_bytes()).hexdigest()).unlink()
    with pytest.raises(SourceError, match=f"1 of 4 safetensors files are missing \\({SHARD}\\)"):
        LocalSource(snapshot)


def test_the_description_is_the_same_everywhere(checkpoint: Path, copy: Path) -> None:
    source = LocalSource(copy)
    described = description(source)
    assert described == description(LocalSource(checkpoint))
    assert source.fingerprint() == LocalSource(checkpoint).fingerprint()
    assert str(copy) not in json.dumps(described)
    names = [file["name"] for file in described["files"]]
    shards = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert names == [*shards, *sorted(set(names) - set(shards))]  # lineage counts shards from 0
    assert {"config.json", "LICENSE"} <= set(names)
    for file in described["files"]:
        raw = (copy / file["name"]).read_bytes()
        assert file["bytes"] == len(raw)
        assert file["sha256"] == hashlib.sha256(raw).hexdigest()


def test_another_byte_is_another_source(copy: Path) -> None:
    before = LocalSource(copy)
    fingerprint, described = before.fingerprint(), description(before)
    raw = bytearray((copy / SHARD).read_bytes())
    raw[-1] ^= 1
    (copy / SHARD).write_bytes(raw)
    assert LocalSource(copy).fingerprint() != fingerprint
    assert description(LocalSource(copy)) != described


def test_only_known_files_travel_along(copy: Path) -> None:
    for name in ("README.md", "modeling.py", "encoding.py", "LICENSE-CODE", "id_rsa"):
        (copy / name).write_text("x")
    aux = LocalSource(copy).aux_files()
    assert list(aux) == ["LICENSE", "LICENSE-CODE", "config.json", "generation_config.json"]
    assert all(data == (copy / name).read_bytes() for name, data in aux.items())


def test_a_shard_that_changes_underneath_is_noticed(copy: Path) -> None:
    source = LocalSource(copy)
    entry = source.entries["layers.0.attn_norm.weight"]
    with (copy / entry.file).open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match="do not change a checkpoint while it is read"):
        source.read(entry)
    (copy / entry.file).unlink()
    with pytest.raises(SourceError, match=f"has no {entry.file}"):
        source.read(entry)


def test_a_dtype_unknown_to_us_is_refused_only_when_read(copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    header = b'{"f":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (copy / "f.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x12")
    source = LocalSource(copy)
    with pytest.raises(SourceError, match=r"f\.safetensors: f is F4, expected one of"):
        source.read(source.entries["f"])


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / INDEX_FILE
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def _remove(*patterns: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for pattern in patterns:
            for path in directory.glob(pattern):
                path.unlink()

    return apply


def _truncate(directory: Path) -> None:
    os.truncate(directory / SHARD, (directory / SHARD).stat().st_size - 1)


def _duplicate(directory: Path) -> None:
    (directory / INDEX_FILE).unlink()
    shutil.copy(directory / SHARD, directory / "other.safetensors")


def _replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / SHARD).unlink()
        make(directory / SHARD)

    return apply


_WRONG_NAME = "expected the plain name of a .safetensors file in the same directory"

DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        _remove("config.json"),
        "has safetensors files but no config.json; put the config.json of the same",
    ),
    "config is no JSON": (_write("config.json", "{,}"), "config.json is not valid JSON"),
    "config is a list": (_write("config.json", "[]"), "is a JSON list, expected an object"),
    "config has a key twice": (
        _write("config.json", '{"a":1,"a":2}'),
        "config.json .* has 'a' twice",
    ),
    "config nests deeply": (_write("config.json", '{"a":' * 100_000), "config.json is not valid"),
    "no safetensors": (_remove("*.safetensors", INDEX_FILE), "has no safetensors files"),
    "no shards but an index": (
        _remove("*.safetensors"),
        r"4 of 4 safetensors files are missing \(model-00001-of-00004.safetensors, .*, \.\.\.\)",
    ),
    "missing shard": (_remove(SHARD), rf"1 of 4 safetensors files are missing \({SHARD}\)"),
    "missing shard, no index": (
        _remove(SHARD, INDEX_FILE),
        rf"1 of 4 safetensors files are missing \({SHARD}\); download",
    ),
    "missing last shard, no index": (
        _remove("model-00004*", INDEX_FILE),
        r"1 of 4 safetensors files are missing \(model-00004-of-00004.safetensors\); download",
    ),
    "truncated shard": (_truncate, f"{SHARD}: tensor .* is truncated, download it again"),
    "empty shard": (_write(SHARD, ""), f"{SHARD} is empty, expected a safetensors file"),
    "shard is a directory": (_replace_by(Path.mkdir), f"{SHARD} is not a regular file"),
    "shard is a pipe": (_replace_by(os.mkfifo), f"{SHARD} is not a regular file"),
    "same tensor in two files": (_duplicate, f"is in {SHARD} and in other.safetensors"),
    "index without map": (_write(INDEX_FILE, "{}"), "has no weight_map"),
    "index with a list": (_write(INDEX_FILE, '{"weight_map":[]}'), "has no weight_map"),
    "index is no JSON": (_write(INDEX_FILE, "{x"), "is not valid JSON"),
    "index names a path upwards": (
        _index(lambda m: m.update({"head.weight": "../x.safetensors"})),
        _WRONG_NAME,
    ),
    "index names an absolute path": (
        _index(lambda m: m.update({"head.weight": "/x.safetensors"})),
        _WRONG_NAME,
    ),
    "index names a folder": (
        _index(lambda m: m.update({"head.weight": "a/x.safetensors"})),
        _WRONG_NAME,
    ),
    "index names another kind of file": (
        _index(lambda m: m.update({"head.weight": "x.bin"})),
        _WRONG_NAME,
    ),
    "index names a number": (_index(lambda m: m.update({"head.weight": 1})), _WRONG_NAME),  # type: ignore[dict-item]  # hostile
    "index puts a tensor elsewhere": (
        _index(lambda m: m.update({"head.weight": SHARD})),
        f"puts tensor 'head.weight' in {SHARD}, but it is in model-00004-of-00004",
    ),
    "index has a tensor too many": (
        _index(lambda m: m.update({"ghost": SHARD})),
        f"puts tensor 'ghost' in {SHARD}, but no file has it",
    ),
    "index lacks a tensor": (
        _index(lambda m: m.pop("head.weight")),
        r"1 tensors are in no entry of .* \(head.weight\)",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_refused_with_its_sentence(copy: Path, defect: str) -> None:
    damage, sentence = DEFECTS[defect]
    damage(copy)
    with pytest.raises(SourceError, match=sentence):
        LocalSource(copy)


def test_a_path_that_is_no_directory_is_refused(copy: Path) -> None:
    for path in (copy / "nowhere", copy / "config.json"):
        with pytest.raises(SourceError, match="is not a directory"):
            LocalSource(path)


def test_odd_shapes_are_read_in_rows(tmp_path: Path) -> None:
    write_tiny(tmp_path / "odd", ODD)
    source = LocalSource(tmp_path / "odd")
    expected = stored_tensors(tmp_path / "odd")
    for name in ("embed.weight", "layers.1.attn.wq_a.scale", "layers.0.ffn.gate.tid2eid"):
        rows = expected[name].shape[0]
        parts = [
            source.read_rows(source.entries[name], at, min(at + 100, rows))
            for at in range(0, rows, 100)
        ]
        joined = torch.cat([part.view(torch.uint8) for part in parts])
        assert torch.equal(joined, expected[name].view(torch.uint8))
