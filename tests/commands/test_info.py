"""`dsv4 info` against what else says the same, and `dsv4 inspect`'s hints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import dsv4
from dsv4.cli import cli
from dsv4.commands.info import _model_facts, _number
from dsv4.convert.metadata import planned_nodes
from dsv4.formats.errors import StoreError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.releases import MODELS
from dsv4.formats.store.writer import StoreWriter
from dsv4.sharing.card import write_card
from dsv4.synthetic.store import make_store, plan_store
from dsv4.validate.values_root import values_root
from tests.runtime.test_fit import SMALL
from tests.support.oracles import source_values


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def document(*arguments: str | Path) -> dict[str, Any]:
    done = run("info", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_store_and_its_source_say_the_same(tiny_source: Path, standard_store: Path) -> None:
    """Parameters are counted from the config; the safetensors library counts the source's."""
    store, source = document(standard_store), document(tiny_source)
    values = source_values(tiny_source)
    numbers = {name: math.prod(v.shape) for name, v in values.items() if "tid2eid" not in name}
    draft = sum(count for name, count in numbers.items() if name.startswith("mtp."))
    for found in (store, source):
        assert found["draft"] == {"kind": "mtp", "layers": 1, "parameters": draft}
        assert found["parameters"] == sum(numbers.values()) - draft
    shared = ("layers", "experts", "context_tokens", "active_parameters", "recipe")
    assert [store[key] for key in shared] == [source[key] for key in shared]
    assert sorted(store["rounded_tensors"]) == sorted(source["rounded_tensors"])
    assert "head.weight" in store["rounded_tensors"]
    packed = dsv4.open(standard_store)
    assert store["root"] == packed.store.manifest["root"]
    losses = {name: packed.provenance(name)["loss"]["rel_mse"] for name in store["rounded_tensors"]}
    assert store["worst"]["rel_mse"] == max(losses.values()) == losses[store["worst"]["name"]]
    assert store["disk_bytes"] > source["packed_bytes"] * 0.99


def test_every_expert_that_was_rounded_is_counted(tmp_path: Path) -> None:
    """A source in BF16: no expert can be carried."""
    source, out = tmp_path / "source", tmp_path / "packed"
    assert run("tiny", source, "--flavour", "bf16").exit_code == 0
    assert run("convert", "--hf", source, "--out", out).exit_code == 0
    packed = dsv4.open(out)
    names = packed.names()
    rounded = [name for name in names if not packed.provenance(name)["exact"]]
    assert sorted(document(out)["rounded_tensors"]) == sorted(rounded)
    assert sum(".experts." in name for name in rounded) > 100
    card = write_card(packed.store, "some-org/some-store").decode()
    assert f"{len(names) - len(rounded):,} of {len(names):,} tensors are exact" in card


def test_a_store_that_is_begun_is_said_to_be_unfinished(tmp_path: Path) -> None:
    StoreWriter(tmp_path / "out", {"pull": {}}).close()
    with pytest.raises(StoreError, match="it is unfinished"):
        raise run("info", tmp_path / "out").exception or AssertionError


def test_the_root_of_values_is_asked_for(native_store: Path, tiny_source: Path) -> None:
    assert "values_root" not in document(native_store)
    found = document(native_store, "--values")["values_root"]
    assert found == values_root(dsv4.open(native_store))
    shown = run("info", native_store, "--values").stdout
    assert f"root of values  {found}" in shown and "none: every value equals the source" in shown
    refused = run("info", tiny_source, "--values")
    assert refused.exit_code == 2 and "which" in refused.stderr


def test_what_runs_it_is_what_fit_says(tmp_path: Path) -> None:
    make_store(tmp_path / "packed", SMALL)
    found = document(tmp_path / "packed", "--context", "500")
    done = run("fit", tmp_path / "packed", "--gpu", "h200", "--context", "500", "--json")
    needs = json.loads(done.stdout)
    assert found["gpu"]["needed_bytes"] == needs["needed_bytes"]
    assert found["gpu"]["context"] == needs["needs"]["context"] == 500
    assert "h200" in found["gpu"]["hold_all"]
    assert "runs on" in run("info", tmp_path / "packed").stdout


@pytest.mark.parametrize(
    "model, total, active",
    [("flash", 284e9, 13e9), pytest.param("pro", 1.6e12, 49e9, marks=pytest.mark.long)],
)
def test_parameters_are_those_that_deepseek_says(model: str, total: float, active: float) -> None:
    """The model cards' numbers, to two digits."""
    facts = _model_facts(planned_nodes(plan_store(MODELS[model], draft=DraftKind.NONE), model))
    assert facts["parameters"] == pytest.approx(total, rel=0.02)
    assert facts["active_parameters"] == pytest.approx(active, rel=0.05)
    assert facts["draft"]["layers"] == 0


def test_numbers_of_parameters() -> None:
    assert [_number(n) for n in (950, 8_260_000, 284_332_000_000)] == ["950", "8.26 M", "284 B"]


def test_inspect_hints_at_globs_and_lists(native_store: Path) -> None:
    names = dsv4.open(native_store).names()
    count = sum(".ffn." in name for name in names)
    for tensor, hint in (
        ("ffn", f"'*.ffn.*' lists {count} tensors"),
        ("layers.2.attn", "'layers.2.attn.*' lists"),
        ("haed.weight", "did you mean head.weight"),
        ("*.zzz", "no tensor's name matches"),
    ):
        with pytest.raises(StoreError, match=re.escape(hint)):
            CliRunner().invoke(cli, ["inspect", str(native_store), tensor], catch_exceptions=False)
    done = run("inspect", native_store, "--list", "--json")
    assert list(json.loads(done.stdout)["tensors"]) == names
    done = run("inspect", native_store, "model.layers.2.self_attn.*", "--json")
    own = [name for name in names if name.startswith("layers.2.attn.")]
    assert list(json.loads(done.stdout)["tensors"]) == own and own
    assert run("inspect", native_store, "head.weight", "--list").exit_code == 2
