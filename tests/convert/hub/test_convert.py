"""From the hub to a packed store: the same bytes as from a directory, whatever the network does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4
from dsv4.convert.estimate import budget_for, forecast
from dsv4.convert.memory import DEFAULT_MEMORY
from dsv4.convert.plan import make_plan
from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ChangedSourceError, ConflictError, SourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.synthetic.tiny import TINY, write_tiny
from dsv4.validate.diff import diff
from tests.convert.hub.loopback import (
    COMMIT,
    FOREVER,
    OLD_COMMIT,
    Loopback,
    cuts,
    isolate,
    says,
    serve,
    with_body,
)

SHARD = "model-00004-of-00009.safetensors"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the hub's format: MXFP4 experts, nine files."""
    out = tmp_path_factory.mktemp("directory") / "checkpoint"
    write_tiny(out, TINY)
    return out


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setattr(Patience, "_wait", lambda *_: 0.001)
    with serve(directory) as running:
        isolate(monkeypatch, tmp_path / "home", running.endpoint)
        yield running


@pytest.fixture(scope="module")
def expected(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the store made from the directory, but for the metadata that names it."""
    out = tmp_path_factory.mktemp("expected") / "packed"
    dsv4.convert(directory, out)
    return contents(out)


def contents(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file() and path.name not in ("zarr.json", "dsv4.complete")
    }


def damage_weights(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


def test_bytes_are_those_of_the_directory(
    hub: Loopback, directory: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    summary = dsv4.convert(hub.repo, tmp_path / "packed")
    assert contents(tmp_path / "packed") == expected
    assert dsv4.validate(tmp_path / "packed", source=directory).ok
    origin = dsv4.open(tmp_path / "packed").store.manifest["origin"]
    assert origin == {"kind": "hub", "repo": hub.repo, "commit": COMMIT}
    again = dsv4.convert(hub.repo, tmp_path / "again", revision=COMMIT, workers=1)
    assert again.root == summary.root


def test_the_root_is_that_of_a_download(hub: Loopback, directory: Path, tmp_path: Path) -> None:
    """Whoever downloaded first compares with whoever did not; what else lies there is no matter."""
    local = Path(shutil.copytree(directory, tmp_path / "download"))
    (local / "README.md").write_text("# a card\n")
    (local / ".cache").mkdir()
    from_hub = dsv4.convert(hub.repo, tmp_path / "hub")
    from_folder = dsv4.convert(local, tmp_path / "folder")
    assert from_hub.root == from_folder.root
    documents = [json.loads((tmp_path / n / "zarr.json").read_text()) for n in ("hub", "folder")]
    manifests = [document["attributes"]["dsv4"] for document in documents]
    origins = [manifest.pop("origin") for manifest in manifests]
    assert origins == [{"kind": "hub", "repo": hub.repo, "commit": COMMIT}, {"kind": "local"}]
    assert manifests[0] == manifests[1]
    stores = [dsv4.open(tmp_path / name) for name in ("hub", "folder")]
    assert diff(*stores) == []


def test_the_network_carries_what_the_plan_said(hub: Loopback, tmp_path: Path) -> None:
    source = open_source(hub.repo)
    plan = make_plan(source, make_recipe("standard"))
    said = forecast(plan, source, budget_for(plan, source, DEFAULT_MEMORY, 2)).network_bytes
    assert said == sum(source.sizes.values())  # small tensors are all held: nothing is read twice
    for_headers = sum(map(hub.bytes_served, source.sizes))
    dsv4.convert(hub.repo, tmp_path / "packed", workers=2)
    served = sum(map(hub.bytes_served, source.sizes))
    assert served == 2 * for_headers + said
    assert not list(tmp_path.rglob("*.safetensors"))  # the source never touched the disk


def test_faults_on_the_way_change_nothing(
    hub: Loopback, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for number in range(1, 10):
        file = f"model-{number:05d}-of-00009.safetensors"
        hub.faults.plant(cuts(1000 * number), file=file, skip=1)
        hub.faults.plant(says(503), file=file, skip=1)
        hub.faults.plant(says(429, Retry_After="0"), host="hub", file=file, skip=1)
    dsv4.convert(hub.repo, tmp_path / "packed", workers=2)
    assert contents(tmp_path / "packed") == expected


def test_wrong_bytes_are_refused_and_dropped(
    hub: Loopback, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    hub.faults.plant(with_body(damage_weights), file=SHARD, skip=1)
    with pytest.raises(ChangedSourceError, match=rf"{SHARD}: .* SHA-256 .* run the same command"):
        dsv4.convert(hub.repo, out)
    assert not (out / "dsv4.complete").exists()
    served = hub.bytes_served(SHARD)
    dsv4.convert(hub.repo, out)
    assert hub.bytes_served(SHARD) > served
    assert contents(out) == expected


def test_an_outage_keeps_what_is_finished(
    hub: Loopback, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    last = "model-00009-of-00009.safetensors"
    hub.faults.plant(says(503), file=last, skip=1, times=FOREVER)
    with pytest.raises(SourceError, match=rf"{last}.*run the command again"):
        dsv4.convert(hub.repo, out, workers=1)
    hub.faults._planted.clear()
    first = "model-00001-of-00009.safetensors"
    hub_bytes = hub.bytes_served(first)
    summary = dsv4.convert(hub.repo, out)
    assert summary.resumed_units > 50
    header_only = hub.bytes_served(first) - hub_bytes
    assert header_only < hub_bytes  # its weights were not asked for again
    assert contents(out) == expected


def test_another_commit_is_another_conversion(
    hub: Loopback, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    hub.faults.plant(says(404), file=SHARD, skip=1, times=FOREVER)
    with pytest.raises(SourceError):
        dsv4.convert(hub.repo, out)
    changed = Path(shutil.copytree(directory, tmp_path / "changed"))
    raw = bytearray((changed / SHARD).read_bytes())
    raw[-1] ^= 1
    (changed / SHARD).write_bytes(raw)
    with serve(changed) as other:
        isolate(monkeypatch, tmp_path / "home", other.endpoint)
        with pytest.raises(ConflictError, match="files of the source are not those") as caught:
            dsv4.convert(other.repo, out)
        assert not re.search("[0-9a-f]{64}", str(caught.value))


def test_a_branch_that_moved_is_named_by_its_commits(hub: Loopback, tmp_path: Path) -> None:
    """And the command in the refusal goes on with what is there."""
    out, last = tmp_path / "packed", "model-00009-of-00009.safetensors"
    hub.faults.plant(says(404), file=last, skip=1, times=FOREVER)
    with pytest.raises(SourceError):
        dsv4.convert(hub.repo, out, revision="v1", workers=1)
    hub.faults._planted.clear()
    with pytest.raises(ConflictError) as caught:
        dsv4.convert(hub.repo, out)
    assert f"begun from commit {OLD_COMMIT}, now it is {COMMIT}" in str(caught.value)
    (command,) = re.findall("`(dsv4 convert [^`]*)`", str(caught.value))
    expected = f"dsv4 convert --hf {hub.repo} --revision {OLD_COMMIT} --out {out}"
    assert command == expected
    summary = dsv4.convert(hub.repo, out, revision=OLD_COMMIT)
    assert summary.resumed_units > 50


def test_the_commands_read_a_hub(hub: Loopback, tmp_path: Path) -> None:
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "DO_NOT_TRACK": "1",
    }
    env.pop("HF_HUB_OFFLINE", None)

    def dsv4_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsv4", *arguments]
        return subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    planned = dsv4_command("plan", hub.repo, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["network_bytes"] > 9e6
    done = dsv4_command("convert", "--hf", hub.repo, "--out", "packed", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[-1]["done_bytes"] == events[-1]["total_bytes"]
    assert json.loads(done.stdout)["root"] == dsv4.open(tmp_path / "packed").store.manifest["root"]
    checked = dsv4_command("validate", "packed", "--source", hub.repo)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    missing = dsv4_command("plan", "some-org/no-such-model")
    assert missing.returncode == 2
    assert missing.stderr.startswith("dsv4: ") and "Traceback" not in missing.stderr
