"""`--keep`: names in both conventions, and patterns that keep nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert.keep import refuse_idle_keep
from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ConfigError
from dsv4.formats.model.dialects import hub_stem
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.user_names import names_of


@pytest.fixture(scope="module")
def source(tiny_source: Path) -> Source:
    return open_source(tiny_source)


def _plan(source: Source, keep: str | list[str], recipe: str = "standard") -> Plan:
    plan = make_plan(source, make_recipe(recipe, keep))
    refuse_idle_keep(plan)
    return plan


def _rounded(plan: Plan) -> set[str]:
    return set(plan.to_dict()["rounded_tensors"])


def test_every_name_leads_back_to_its_tensor(source: Source) -> None:
    """By the table that reads checkpoints, which the dialects' tests hold against transformers."""
    plan = make_plan(source, make_recipe("standard"))
    renamed = 0
    for name in plan.inventory.by_name:
        for other in names_of(name):
            stem, role = hub_stem(other)
            found = f"{stem}.{role}" if role else stem
            if "gate_up_proj" not in other and not other.endswith("experts.down_proj"):
                assert found == name, other
                renamed += name.split(".")[-2:] != other.split(".")[-2:]
    assert renamed > 500


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("lm_head.weight", {"head.weight"}),
        ("head.weight", {"head.weight"}),
        ("model.layers.4.mlp.gate.weight", {"layers.4.ffn.gate.weight"}),
        (["layers.4.ffn.gate.*", "lm_head.*"], {"layers.4.ffn.gate.weight", "head.weight"}),
    ],
)
def test_both_conventions_keep_the_same(
    source: Source, keep: str | list[str], kept: set[str]
) -> None:
    assert _rounded(_plan(source, [])) - _rounded(_plan(source, keep)) == kept


def test_a_string_is_one_pattern(source: Source) -> None:
    assert _plan(source, "*.gate.weight").recipe.keep == ("*.gate.weight",)
    assert _rounded(_plan(source, "*.gate.weight")) == {"head.weight"}


@pytest.mark.parametrize(
    ("keep", "recipe", "said"),
    [
        ("*.gate.weigth", "standard", "matches no tensor; did you mean '*.gate.weight'?"),
        ("layers.2.ffn.gates.*", "standard", "did you mean 'layers.2.ffn.gate.*'?"),
        ("model.layers.5.mlp.gat.weight", "standard", "'model.layers.5.mlp.gate.weight'"),
        ("layers.99.ffn.gate.weight", "standard", "did you mean 'layers.*.ffn.gate.weight'?"),
        ("lm_haed.weight", "standard", "did you mean 'lm_head.weight'?"),
        ("*.wq_c.weight", "nvfp4", "did you mean '*.wq_"),
        ("embed.weigth", "standard", "the nearest is 'embed.weight', which is carried anyway"),
        ("zzz", "standard", "matches no tensor; it rounds layers.*.ffn.gate.weight, "),
        ("embed.weight", "standard", "1 tensor is carried anyway (embed.weight); it rounds"),
        ("*.experts.*", "standard", "168 tensors are carried anyway"),
        ("*.gate.weight", "native", "it rounds nothing here, so leave --keep out"),
        ("", "standard", "--keep '' matches no tensor"),
    ],
)
def test_a_pattern_that_keeps_nothing_is_refused(
    source: Source, keep: str, recipe: str, said: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        _plan(source, keep, recipe)
    assert said in str(refusal.value)
    with pytest.raises(ConfigError):  # beside one that keeps something, too
        _plan(source, ["head.weight", keep], recipe)


def test_the_commands_refuse_it(tiny_source: Path, tmp_path: Path) -> None:
    for command in (["plan"], ["convert", "--out", str(tmp_path / "packed"), "--hf"]):
        done = CliRunner().invoke(cli, [*command, str(tiny_source), "--keep", "*.gates.weight"])
        assert isinstance(done.exception, ConfigError)
        assert "'*.gate.weight'" in str(done.exception)
    with pytest.raises(ConfigError, match="matches no tensor"):
        dsv4.convert(tiny_source, tmp_path / "packed", keep="*.gates.weight")
    assert not (tmp_path / "packed").exists()


def test_what_keeping_the_gates_costs(tiny_source: Path, tmp_path: Path) -> None:
    """The bytes that are named are those that the store grows by."""
    said = dsv4.convert(tiny_source, tmp_path / "a").to_dict()
    kept = dsv4.convert(tiny_source, tmp_path / "b", keep=said["router_gates"]["keep"]).to_dict()
    assert kept["output_bytes"] - said["output_bytes"] == said["router_gates"]["more_bytes"] > 0
    assert kept["router_gates"] is None
    assert len(said["rounded_tensors"]) - len(kept["rounded_tensors"]) == 7
    shown = CliRunner().invoke(
        cli, ["convert", "--hf", str(tiny_source), "--out", str(tmp_path / "c")]
    )
    assert "7 rounded; --keep '*.gate.weight' carries them for 7.1 kB more" in shown.stdout
