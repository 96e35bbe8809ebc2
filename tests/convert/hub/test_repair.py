"""Repair over the network: the repository and commit are the manifest's."""

from __future__ import annotations

from pathlib import Path

import pytest

import dsv4
from dsv4.convert.sources.http import Patience
from dsv4.formats.errors import SourceError
from tests.convert.hub.loopback import Loopback, isolate
from tests.formats.store.packing import tree


def test_the_manifest_says_where_the_bytes_are(
    hub: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Patience, "_wait", lambda *_: 0.001)
    isolate(monkeypatch, tmp_path / "home", hub.endpoint)
    packed = tmp_path / "packed"
    dsv4.convert(hub.repo, packed)
    published = tree(packed)
    codes = next(p for p in packed.glob("layers/*/ffn/experts/w2/codes/c/**/*") if p.is_file())
    raw = bytearray(codes.read_bytes())
    raw[7] ^= 1
    codes.write_bytes(raw)
    (packed / "assets/config.json").unlink()
    report = dsv4.repair(packed)
    assert report.ok
    assert hub.repo in str(report.source)
    assert tree(packed) == published
    (packed / "norm/weight/c/0").unlink()
    isolate(monkeypatch, tmp_path / "home")
    with pytest.raises(SourceError):
        dsv4.repair(packed)
