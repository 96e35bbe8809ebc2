"""Synthetic stores: what a conversion would write but for the numbers, and nothing is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zarr
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.formats.errors import ConflictError, OutOfSpaceError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.releases import FLASH
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.zarr_json import descriptions
from dsv4.synthetic.store import make_store, shaped
from dsv4.synthetic.tiny import TINY

FREE = ("sources", "loss", "rel_mse", "exact", "recoded_blocks", "rounded_blocks")
SMALL = dataclasses.replace(
    FLASH,
    vocab_size=1024,
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    moe_intermediate_size=256,
    n_routed_experts=16,
    num_hash_layers=1,
    compress_ratios=(0, 4),
)


def _nodes(store: PackedStore) -> dict[str, dict[str, Any]]:
    """Every node without what was measured or depends on the source."""
    nodes = descriptions(store.hierarchy.groups, store.hierarchy.arrays)
    for node in nodes.values():
        for field in FREE:
            node["attributes"].get("dsv4", {}).pop(field, None)
    return nodes


def test_nodes_are_those_of_a_conversion(standard_store: Path, tmp_path: Path) -> None:
    converted = PackedStore.open(standard_store)
    made = make_store(tmp_path / "made", TINY, draft=DraftKind.MTP)
    store = PackedStore.open(made.path)
    assert _nodes(store) == _nodes(converted)
    files = [key for key in converted.records if not key.startswith("assets/")]
    assert {key: store.records[key].nbytes for key in files} == {
        key: converted.records[key].nbytes for key in files
    }
    assert made.files == len(files)
    assert made.nbytes == sum(converted.records[key].nbytes for key in files)


@pytest.mark.parametrize("recipe", ["native", "nvfp4"])
def test_nothing_is_wrong_with_it(tmp_path: Path, recipe: str) -> None:
    made = make_store(tmp_path / "made", SMALL, recipe=recipe, draft=DraftKind.MTP, workers=2)
    report = dsv4.validate(made.path)
    assert report.ok, report.findings
    group = zarr.open_group(made.path, mode="r")
    assert group["layers/0/ffn/experts/w13/codes"].shape == (16, 512, 256)  # type: ignore[union-attr]
    root = PackedStore.open(made.path).manifest["root"]
    assert root == made.root
    if recipe == "native":
        again = make_store(tmp_path / "again", SMALL, draft=DraftKind.MTP, workers=1, recipe=recipe)
        assert again.root == root


def test_a_model_of_it_computes_numbers(tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", SMALL)
    logits = dsv4.load(made.path).session(8).forward(torch.tensor([1, 2, 3]))
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_shapes_are_the_release_s() -> None:
    whole = shaped("pro", 3)
    assert (whole.num_hidden_layers, whole.n_routed_experts, whole.vocab_size) == (3, 384, 129280)
    assert shaped("flash", 1, experts=8, vocabulary=512).n_routed_experts == 8


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        with pytest.raises(OutOfSpaceError, match="the bench needs"):
            make_store(tmp_path / "huge", SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    with pytest.raises(ConflictError, match="not empty"):
        make_store(tmp_path / "full", SMALL)


def test_the_command_makes_one(tmp_path: Path) -> None:
    out = tmp_path / "made"
    sizes = ("--layers", "1", "--experts", "8", "--vocabulary", "512")
    done = CliRunner().invoke(cli, ["bench", "store", str(out), *sizes, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["root"] == PackedStore.open(out).manifest["root"]


def test_layers_that_share_files_are_whole_and_true(tmp_path: Path) -> None:
    """Four layers, of which two have files of their own; validation reads every byte."""
    config = dataclasses.replace(SMALL, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
    made = make_store(tmp_path / "made", config, distinct=2, workers=2)
    whole = make_store(tmp_path / "whole", config, workers=2)
    assert made.nbytes == whole.nbytes == whole.written
    assert made.written < 0.7 * made.nbytes
    report = dsv4.validate(made.path)
    assert report.ok, report.findings
    codes = [made.path / f"layers/{n}/ffn/experts/w13/codes/c/0/0/0" for n in range(4)]
    inodes = [path.stat().st_ino for path in codes]
    assert inodes[0] == inodes[2] != inodes[1] == inodes[3]
    assert codes[0].read_bytes() != codes[1].read_bytes()
