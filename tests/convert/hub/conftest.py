"""A hub on this machine, and sources that read it; nothing reaches any other network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub import HubSource
from dsv4.synthetic.tiny import HF_TINY, write_tiny
from tests.convert.hub.loopback import Loopback, isolate, serve

Open = Callable[..., HubSource]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "checkpoint"
    write_tiny(out, HF_TINY)
    return out


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No real hub, no real login, no real cache, no telemetry."""
    isolate(monkeypatch, tmp_path)
    yield
    close_session()


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Loopback]:
    with serve(checkpoint) as running:
        yield running


@dataclasses.dataclass
class Waits:
    """Instead of sleeping: notes how long, and lets a test act meanwhile."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    meanwhile: Callable[[], Any] = lambda: None

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.meanwhile()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def patience(waits: Waits) -> Patience:
    return Patience(read=2.0, connect=2.0, sleep=waits)


@pytest.fixture
def opened(hub: Loopback, patience: Patience) -> Open:
    """Opens the hub's repository."""

    def open_(revision: str | None = None, **options: Any) -> HubSource:
        defaults: dict[str, Any] = {"endpoint": hub.endpoint, "patience": patience}
        return HubSource(hub.repo, revision, **(defaults | options))

    return open_
