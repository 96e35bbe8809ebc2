"""A hub that takes uploads, and a store to share: small, with every kind of file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

import dsv4
from dsv4.convert.sources.http import Patience
from dsv4.synthetic.tiny import TINY, write_tiny
from tests.convert.hub.loopback import TOKEN, isolate
from tests.sharing.hub import SharingHub, sharing_hub

CONFIG = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    compress_ratios=(0, 0),
    num_hash_layers=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with draft layers. Not to be written to."""
    folder = tmp_path_factory.mktemp("shared")
    write_tiny(folder / "hub", CONFIG)
    dsv4.convert(folder / "hub", folder / "packed")
    return folder / "packed"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharingHub]:
    """Empty but for its .gitattributes. Whoever may write is logged in; waits are short."""
    monkeypatch.setattr(Patience, "_wait", lambda *_: 0.001)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with sharing_hub(tmp_path / "hub") as running:
        isolate(monkeypatch, tmp_path / "home", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
        close_session()


@pytest.fixture
def published(hub: SharingHub, shared_store: Path) -> SharingHub:
    """It holds the store, pushed by somebody's other client."""
    hub.publish(shared_store)
    return hub
