"""A hub that takes uploads, and a store to share: small, with every kind of file."""

from __future__ import annotations

import dataclasses
import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """huggingface_hub uploads by an argument that httpx2 calls old."""
    for item in items:
        if "sharing" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content="))


@pytest.fixture(autouse=True)
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power, and syncs are most of a small pull's time."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


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
