"""One small model in every flavour, written once and packed once per recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv4.convert.engine import convert
from dsv4.synthetic.tiny import TINY, write_tiny

SMALL = dataclasses.replace(
    TINY,
    num_hidden_layers=3,
    compress_ratios=(0, 128, 4),
    num_hash_layers=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
)

FlavourSource = Callable[[str], Path]
FlavourStore = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def flavour_source(tmp_path_factory: pytest.TempPathFactory) -> FlavourSource:
    """Writes SMALL in a flavour. Not to be written to."""
    made: dict[str, Path] = {}

    def make(flavour: str) -> Path:
        if flavour not in made:
            made[flavour] = tmp_path_factory.mktemp(flavour) / "hub"
            write_tiny(made[flavour], SMALL, flavour=flavour)
        return made[flavour]

    return make


@pytest.fixture(scope="session")
def flavour_store(
    flavour_source: FlavourSource, tmp_path_factory: pytest.TempPathFactory
) -> FlavourStore:
    """Packs a flavour by a recipe. Not to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def make(flavour: str, recipe: str) -> Path:
        key = (flavour, recipe)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "packed"
            convert(flavour_source(flavour), made[key], recipe=recipe)
        return made[key]

    return make
