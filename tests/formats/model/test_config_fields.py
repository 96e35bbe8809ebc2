"""A config.json with any one field spoilt is read or refused by name, never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.formats.errors import ConfigError
from dsv4.formats.model.config import ModelConfig
from tests.support.real_configs import FLASH, FLASH_0731, PRO, PRO_0813

SPOILT: list[Any] = [
    *(None, "x", "1", [], {}, True, -1, 0, 1.5, 10**30),
    *(float("inf"), float("nan"), [[]], [None], [{}], {"a": 1}),
]


def fields(config: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from fields(value, (*at, name))


def spoil(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    spoilt = copy.deepcopy(config)
    inner = spoilt
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return spoilt


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """FLASH_0731 as transformers writes it."""
    from transformers import AutoConfig

    out = tmp_path_factory.mktemp("config")
    (out / "config.json").write_text(json.dumps(FLASH_0731))
    AutoConfig.from_pretrained(out).save_pretrained(out / "again")
    config: dict[str, Any] = json.loads((out / "again" / "config.json").read_text())
    return config


def refusals(config: dict[str, Any]) -> set[str]:
    refused = set()
    for path in fields(config):
        for value in SPOILT:
            try:
                ModelConfig.from_hf(spoil(config, path, value))
            except ConfigError as error:
                assert str(error).startswith("config")
                refused.add(path[-1])
    return refused


def test_the_hub_dialect_never_breaks_the_reader() -> None:
    refused = refusals(FLASH_0731)
    assert {"eos_token_id", "rope_scaling", "beta_fast", "hidden_size", "swiglu_limit"} <= refused


def test_the_transformers_dialect_never_breaks_the_reader(rewritten: dict[str, Any]) -> None:
    refused = refusals(rewritten)
    assert {"compress_rates", "rope_parameters", "attention_factor", "layer_types"} <= refused


@pytest.mark.parametrize("release", [FLASH, FLASH_0731, PRO, PRO_0813])
def test_both_dialects_of_a_release_give_one_config(
    release: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(release))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    hub = ModelConfig.from_hf(release)
    # transformers knows no draft layers.
    assert ModelConfig.from_hf(again) == dataclasses.replace(hub, num_draft_layers=0)
    assert ModelConfig.from_dict(json.loads(json.dumps(hub.to_dict()))) == hub
