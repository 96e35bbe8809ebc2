"""The validator: it passes good stores, and every planted fault makes it fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

import dsv4
from dsv4.convert.engine import convert
from dsv4.convert.outputs.plain import Fp8Output
from dsv4.formats.errors import NoStoreError, SourceError
from dsv4.formats.store.integrity import verify
from dsv4.synthetic.tiny import write_tiny
from tests.support.oracles import stored_tensors


@pytest.fixture
def store(standard_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(standard_store, tmp_path / "store"))


def test_a_good_store_passes_and_says_what_was_checked(
    tiny_source: Path, standard_store: Path
) -> None:
    report = dsv4.validate(standard_store, source=tiny_source)
    assert report.ok
    assert report.findings == []
    assert len(report.tensors) == len(dsv4.open(standard_store).names())
    assert sum(not verdict.exact for verdict in report.tensors) == 8
    assert report.checks["chunk checksums"] >= report.checks["file hashes"] > 300
    assert report.root == dsv4.open(standard_store).store.manifest["root"]
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path, offset: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


def _payload(store: Path, array: str) -> Path:
    return sorted((store / array / "c").rglob("0"))[-1]


FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "bit of expert codes": lambda s: _flip(_payload(s, "layers/2/ffn/experts/w13/codes"), 77),
    "bit of expert scales": lambda s: _flip(_payload(s, "layers/2/ffn/experts/w2/scales"), 5),
    "bit of a global scale": lambda s: _flip(_payload(s, "layers/2/ffn/experts/w2/global_scale")),
    "bit of an FP8 code": lambda s: _flip(_payload(s, "layers/3/attn/wq_b/codes"), 9),
    "bit of an E8M0 scale": lambda s: _flip(_payload(s, "layers/3/attn/wq_b/scales")),
    "bit of a norm": lambda s: _flip(_payload(s, "layers/0/attn_norm/weight"), 3),
    "bit of tid2eid": lambda s: _flip(_payload(s, "layers/0/ffn/gate/tid2eid"), 8),
    "bit of the draft layer": lambda s: _flip(_payload(s, "mtp/0/e_proj/codes"), 1),
    "bit of the tokenizer": lambda s: _flip(s / "assets" / "tokenizer.json", 40),
    "truncated file": lambda s: _payload(s, "head/codes").write_bytes(b"\0" * 100),
    "grown file": lambda s: _grow(_payload(s, "head/codes")),
    "missing file": lambda s: _payload(s, "embed/weight").unlink(),
    "missing node document": lambda s: (s / "head" / "zarr.json").unlink(),
    "edited node document": lambda s: (s / "head" / "zarr.json").write_text("{}"),
    "edited root document": lambda s: _flip(s / "zarr.json", 1000),
    "stranger": lambda s: (s / "head" / "extra.bin").write_bytes(b"x"),
    "missing marker": lambda s: (s / "dsv4.complete").unlink(),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_damaged_store_fails_without_the_source(store: Path, fault: str) -> None:
    FILE_FAULTS[fault](store)
    report = dsv4.validate(store)
    assert not report.ok
    assert report.findings


def test_quick_sees_sizes_but_not_bits(store: Path) -> None:
    _flip(_payload(store, "layers/2/ffn/experts/w13/codes"))
    assert dsv4.validate(store, quick=True).ok
    _payload(store, "head/codes").unlink()
    assert not dsv4.validate(store, quick=True).ok


def _tampered_source(tiny_source: Path, tmp_path: Path, edit: Callable[[bytearray], None]) -> Path:
    """A copy of the source with one shard's bytes edited, as a wrong packer would have read it."""
    wrong = Path(shutil.copytree(tiny_source, tmp_path / "wrong"))
    shard = wrong / "model-00004-of-00009.safetensors"
    raw = bytearray(shard.read_bytes())
    edit(raw)
    shard.write_bytes(raw)
    return wrong


def _range(source: Path, name: str) -> tuple[int, int]:
    from dsv4.convert.sources.local import LocalSource

    entry = LocalSource(source).entries[name]
    return entry.begin, entry.end


def _swap(name_a: str, name_b: str) -> Callable[[Path, bytearray], None]:
    def edit(source: Path, raw: bytearray) -> None:
        (a, a_end), (b, b_end) = _range(source, name_a), _range(source, name_b)
        raw[a:a_end], raw[b:b_end] = raw[b:b_end], raw[a:a_end]

    return edit


def _nibbles(name: str) -> Callable[[Path, bytearray], None]:
    def edit(source: Path, raw: bytearray) -> None:
        begin, end = _range(source, name)
        values = np.frombuffer(bytes(raw[begin:end]), np.uint8)
        raw[begin:end] = ((values >> 4) | (values << 4)).astype(np.uint8).tobytes()

    return edit


def _shift_scales(name: str) -> Callable[[Path, bytearray], None]:
    def edit(source: Path, raw: bytearray) -> None:
        begin, end = _range(source, name)
        raw[begin:end] = raw[begin + 8 : end] + raw[begin : begin + 8]

    return edit


E3 = "layers.2.ffn.experts.3"
SELF_CONSISTENT: dict[str, Callable[[Path, bytearray], None]] = {
    "gate and up swapped": _swap(f"{E3}.w1.weight", f"{E3}.w3.weight"),
    "experts swapped": _swap(f"{E3}.w2.weight", "layers.2.ffn.experts.4.w2.weight"),
    "nibble order": _nibbles(f"{E3}.w1.weight"),
    "scale rows shifted": _shift_scales(f"{E3}.w1.scale"),
    "one FP8 byte": lambda source, raw: raw.__setitem__(
        _range(source, "layers.2.attn.wkv.weight")[0], 0x11
    ),
}


@pytest.mark.parametrize("fault", SELF_CONSISTENT)
def test_a_self_consistent_store_of_wrong_bytes_fails_with_the_source(
    tiny_source: Path, tmp_path: Path, fault: str
) -> None:
    """Checksums all hold, because the wrong bytes were packed: only inversion can tell."""
    wrong = _tampered_source(
        tiny_source, tmp_path, lambda raw: SELF_CONSISTENT[fault](tiny_source, raw)
    )
    convert(wrong, tmp_path / "packed", recipe="native", accept_rounding=True)
    assert dsv4.validate(tmp_path / "packed").ok
    report = dsv4.validate(tmp_path / "packed", source=tiny_source)
    assert not report.ok
    where = {(finding.check, finding.where.replace("/", ".")) for finding in report.findings}
    assert ("source", "model-00004-of-00009.safetensors") in where  # it is another file
    tensors = where - {("source", "model-00004-of-00009.safetensors")}
    assert {check for check, _ in tensors} & {"inversion", "optimum"}
    assert {check for check, _ in tensors} <= {"inversion", "optimum", "bound", "loss"}
    assert all(name.startswith("layers.2.") for _, name in tensors)


def test_wrong_bytes_fail_even_where_the_store_does_not_claim_exactness(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor kept in its own format was never rounded: no claim excuses other bytes."""
    honest = Fp8Output.attributes

    def modest(*args: Any) -> dict[str, Any]:
        return honest(*args) | {"exact": False}

    monkeypatch.setattr(Fp8Output, "attributes", modest)
    fault = SELF_CONSISTENT["one FP8 byte"]
    wrong = _tampered_source(tiny_source, tmp_path, lambda raw: fault(tiny_source, raw))
    convert(wrong, tmp_path / "packed", recipe="native")
    report = dsv4.validate(tmp_path / "packed", source=tiny_source)
    wrong_bytes = [finding.where for finding in report.findings if finding.check == "inversion"]
    assert wrong_bytes == ["layers.2.attn.wkv.weight"]
    understated = [finding for finding in report.findings if finding.check == "loss"]
    assert len(understated) > 10


def test_another_seed_is_another_checkpoint(standard_store: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "hub", seed=1)
    report = dsv4.validate(standard_store, source=tmp_path / "hub")
    assert not report.ok
    (finding,) = report.findings
    assert (finding.check, finding.where[:6]) == ("source", "model-")
    assert finding.message.startswith("this is not what the store was made from: its sha256")
    assert (report.tensors, report.bytes_read) == ([], 0)  # it stopped there


def test_the_same_tensors_in_other_files_are_compared_one_by_one(
    tiny_source: Path, standard_store: Path, tmp_path: Path
) -> None:
    """A checkpoint sharded otherwise: every tensor is equal, only the files are others."""
    (tmp_path / "one").mkdir()
    tensors = stored_tensors(tiny_source)
    save_file(dict(sorted(tensors.items())), tmp_path / "one" / "model.safetensors")
    for asset in tiny_source.iterdir():
        if asset.suffix != ".safetensors" and "index" not in asset.name:
            shutil.copy(asset, tmp_path / "one")
    report = dsv4.validate(standard_store, source=tmp_path / "one")
    names = dsv4.open(standard_store).names()
    assert [verdict.name for verdict in report.tensors] != []
    assert sorted(verdict.name for verdict in report.tensors) == sorted(names)
    assert sum(not verdict.exact for verdict in report.tensors) == 8
    assert [finding.check for finding in report.findings] == ["source"]


FOREIGN = (
    ".gitattributes", "README.md", "README", "LICENSE", "LICENSE.txt", ".DS_Store", ".git/config",
    "head/.DS_Store", ".cache/huggingface/download/zarr.json.metadata", ".huggingface/x",
)  # fmt: skip
STRANGE = (
    "NOTICE", "head/README.md", "assets/.hidden", "weights.bin", "readme", "head/.git/config",
    "README.md/x", "layers/0/LICENSE", "zarr.json.bak", "model.safetensors",
)  # fmt: skip


def test_what_a_hub_leaves_in_a_store_is_a_notice(store: Path) -> None:
    for key in FOREIGN:
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_text("x")
    report = dsv4.validate(store)
    assert report.ok
    (sentence,) = report.notices
    assert sentence.startswith(f"{len(FOREIGN)} files are not the store's")
    opened = dsv4.open(store).store
    verify(opened)
    assert dsv4.repair(store).files == []
    (store / "head/codes/c/0/0").unlink()
    assert not dsv4.validate(store).ok


@pytest.mark.parametrize("key", STRANGE)
def test_any_other_stranger_is_a_finding(store: Path, key: str) -> None:
    (store / key).parent.mkdir(parents=True, exist_ok=True)
    (store / key).write_text("x")
    report = dsv4.validate(store, quick=True)
    (finding,) = report.findings
    assert (finding.check, finding.where) == ("files", key)
    assert report.remedy is None  # repair leaves it alone


def test_damage_names_the_command_that_mends_it(store: Path, tiny_source: Path) -> None:
    _flip(_payload(store, "head/codes"), 3)
    report = dsv4.validate(store)
    assert report.remedy is not None
    command = f"`dsv4 repair {store} --source SRC`"
    assert report.remedy.startswith(command)
    assert dsv4.repair(store, source=tiny_source).ok
    _payload(store, "head/codes").unlink()
    assert command in dsv4.validate(store).findings[0].message


def test_what_is_no_store_is_refused_not_reported(tiny_source: Path, tmp_path: Path) -> None:
    for path, match in (
        (tmp_path / "nosuch", "there is no directory"),
        (tiny_source, "not packed"),
    ):
        with pytest.raises(NoStoreError, match=match):
            dsv4.validate(path)


def test_an_unreadable_source_is_refused(standard_store: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no directory"):
        dsv4.validate(standard_store, source=tmp_path / "nowhere")
