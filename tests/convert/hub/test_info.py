"""`dsv4 info` of a hub id: from headers alone, and the same as of a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsv4.cli import cli
from dsv4.convert.sources import hub as hub_source
from tests.convert.hub.loopback import COMMIT, Loopback, isolate


def info(place: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["info", str(place), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_hub_id_and_a_directory_are_told_alike(
    hub: Loopback, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path, hub.endpoint)
    monkeypatch.setattr(hub_source, "HEAD_BYTES", 1000)
    remote, local = info(hub.repo), info(checkpoint)
    assert remote["origin"] == {"kind": "hub", "repo": hub.repo, "commit": COMMIT}
    assert remote["name"] == hub.repo
    where = ("place", "name", "origin", "gpu_refusal")
    assert {k: v for k, v in remote.items() if k not in where} == {
        k: v for k, v in local.items() if k not in where
    }
    shards = list(checkpoint.glob("*.safetensors"))
    served = sum(hub.bytes_served(path.name) for path in shards)
    assert 0 < served < sum(path.stat().st_size for path in shards) / 4
