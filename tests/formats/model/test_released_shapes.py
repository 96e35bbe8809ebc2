"""The real shapes of the benches are those of the published config.json files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.releases import MODELS
from tests.support.real_configs import FLASH, PRO


@pytest.mark.parametrize(("name", "published"), [("flash", FLASH), ("pro", PRO)])
def test_shapes_are_the_published_ones_without_the_draft(
    name: str, published: dict[str, Any]
) -> None:
    config = ModelConfig.from_hf(published)
    assert MODELS[name] == dataclasses.replace(config, num_draft_layers=0)
