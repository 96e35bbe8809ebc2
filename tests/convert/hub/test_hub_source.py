"""A repository reads like the directory it was made from, whatever part of it is in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from dsv4.convert.sources import hub as hub_source
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub import HubSource
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import SourceError
from tests.convert.hub.conftest import Open
from tests.convert.hub.loopback import COMMIT, NOWHERE, OLD_COMMIT, TOKEN, Loopback, isolate, serve

SHARD = "model-00002-of-00004.safetensors"
TOKENIZER = b'{"model": {}}'


@pytest.fixture
def checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """With a tokenizer, which repositories keep in LFS, and with files that are of no use."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (copy / "tokenizer.json").write_bytes(TOKENIZER)
    (copy / "modeling.py").write_text("raise SystemExit")
    (copy / "notes.txt").write_text("x")
    return copy


def hashes(source: Source) -> dict[str, str]:
    found = {}
    for name, size in source.sizes.items():
        view = memoryview(bytearray(size))
        with source.stream(name) as stream:
            stream.readinto(view[:5])
            stream.readinto(view[5:])
        found[name] = hashlib.sha256(view).hexdigest()
    return found


def test_reads_what_the_directory_has(hub: Loopback, opened: Open, checkpoint: Path) -> None:
    source, local = opened(), LocalSource(checkpoint)
    assert source.config == local.config
    assert source.entries == local.entries
    assert list(source.sizes.items()) == list(local.sizes.items())
    assert source.aux_files() == local.aux_files()
    assert list(source.aux_files()) == sorted(source.aux_files())
    assert "tokenizer.json" in source.aux_files()
    for entry in local.entries.values():
        found, expected = source.read(entry), local.read(entry)
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    entry = local.entries["embed.weight"]
    assert torch.equal(source.read_rows(entry, 3, 9), local.read_rows(entry, 3, 9))
    assert hashes(source) == hashes(local)
    for name, measured in hashes(local).items():
        assert source.published_sha256(name) == measured
        assert source.remote_bytes(name) == source.sizes[name]
    assert not {r.file for r in hub.requests} & {"modeling.py", "notes.txt"}


def test_the_description_is_the_same_everywhere(
    hub: Loopback, opened: Open, checkpoint: Path
) -> None:
    source, local = opened(), LocalSource(checkpoint)
    described = source.description(hashes(source))
    assert described == local.description(hashes(local))
    assert source.origin == {"kind": "hub", "repo": hub.repo, "commit": COMMIT}
    assert local.origin == {"kind": "local"}
    assert source.fingerprint() == opened("feature/x").fingerprint()
    assert source.fingerprint() != opened("v1").fingerprint()


def test_only_headers_are_read_to_open(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_source, "HEAD_BYTES", 1000)
    source = opened()
    source.fingerprint()
    for name in source.sizes:
        begin = min(entry.begin for entry in source.entries.values() if entry.file == name)
        assert hub.bytes_served(name) == max(begin, 1000) < source.sizes[name]
        assert len(hub.ranges(name)) == (2 if begin > 1000 else 1)
    assert {len(hub.ranges(name)) for name in source.sizes} == {1, 2}


def test_many_threads_read_at_once(opened: Open, checkpoint: Path) -> None:
    source, local = opened(), LocalSource(checkpoint)
    entries = list(local.entries.values())
    with ThreadPoolExecutor(8) as pool:
        for entry, found in zip(entries, pool.map(source.read, entries), strict=True):
            assert torch.equal(found.view(torch.uint8), local.read(entry).view(torch.uint8))


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        (None, COMMIT),
        ("main", COMMIT),
        ("feature/x", COMMIT),
        ("v1", OLD_COMMIT),
        (OLD_COMMIT, OLD_COMMIT),
    ],
)
def test_a_revision_is_pinned_to_its_commit(
    hub: Loopback, opened: Open, revision: str | None, commit: str
) -> None:
    source = opened(revision)
    hub.revisions.clear()  # what the branch means by now does not matter
    hashes(source)
    source.aux_files()
    assert source.commit == commit
    paths = [r.path for r in hub.requests if r.host == "hub"]
    assert sum(path.startswith("/api/") for path in paths) == 1
    for path in paths:
        assert path.startswith(("/api/", f"/{hub.repo}/resolve/{commit}/"))


def test_what_does_not_exist_is_refused(hub: Loopback, opened: Open, patience: Patience) -> None:
    with pytest.raises(
        SourceError, match=r"some-org/some-model@v9 is not a revision of .*--revisio"
    ):
        opened("v9")
    with pytest.raises(SourceError, match=r"^some-org/other is not found; check the name"):
        HubSource("some-org/other", endpoint=hub.endpoint, patience=patience)
    for repo in ("a", "a/b/c", "a--b/c", "../a", "a/b.git", "", "a/ b", "/b"):
        with pytest.raises(SourceError, match="is not a hub id such as org/name") as refusal:
            HubSource(repo, endpoint=hub.endpoint)
        assert "\n" not in str(refusal.value)
    for endpoint in ("huggingface.co", "ftp://huggingface.co", "http://"):
        with pytest.raises(
            SourceError, match=r"HF_ENDPOINT is .* expected an address that begins with http"
        ):
            opened(endpoint=endpoint)


# Tokens


@pytest.mark.parametrize("access", ["gated", "private"])
def test_a_token_opens_and_goes_to_the_hub_only(
    checkpoint: Path, patience: Patience, access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(token: str | None = None) -> HubSource:
        return HubSource(hub.repo, endpoint=hub.endpoint, token=token, patience=patience)

    with serve(checkpoint, access=access) as hub:
        with pytest.raises(SourceError, match=r"`hf auth login` or set HF_TOKEN") as refusal:
            open_()
        assert "\n" not in str(refusal.value)
        refused = (
            "is gated; accept the licence" if access == "gated" else "is not accepted: Invalid"
        )
        with pytest.raises(SourceError, match=f"{hub.repo}.* the token that was given") as refusal:
            open_("hf_wrong")
        assert refused in str(refusal.value)
        assert hub.bytes_served(SHARD) == 0
        hub.requests.clear()
        assert hashes(open_(TOKEN))
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)  # as the login stores it
        assert hashes(open_())
        Path(constants.HF_TOKEN_PATH).unlink()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert hashes(open_())
        tokens = {(request.host, request.token) for request in hub.requests}
        assert tokens == {("hub", TOKEN), ("storage", None)}


# The cache


@pytest.fixture
def cache(hub: Loopback, tmp_path: Path) -> Path:
    """The hub's cache as its own library fills it, of branch main."""
    snapshot_download(hub.repo, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    hub.requests.clear()
    return tmp_path / "cache"


@pytest.fixture
def snapshot(cache: Path, hub: Loopback) -> Path:
    return cache / f"models--{hub.repo.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield


def test_what_the_cache_has_is_not_fetched(hub: Loopback, opened: Open, cache: Path) -> None:
    source = opened(cache=cache)
    assert hashes(source) == {name: source.published_sha256(name) for name in source.sizes}
    assert source.aux_files()["tokenizer.json"] == TOKENIZER
    assert [r.path for r in hub.requests] == [f"/api/models/{hub.repo}?blobs=true"]
    assert sum(source.remote_bytes(name) for name in source.sizes) == 0


def test_the_default_cache_is_found(hub: Loopback, opened: Open, cache: Path) -> None:
    opened()
    assert len(hub.requests) == 1


def test_what_the_cache_lacks_is_fetched(
    hub: Loopback, opened: Open, cache: Path, snapshot: Path
) -> None:
    whole = opened(cache=cache)
    (snapshot / SHARD).unlink()
    os.truncate(snapshot / "model-00003-of-00004.safetensors", 5)
    (snapshot / "LICENSE").resolve().write_text("x" * (snapshot / "LICENSE").stat().st_size)
    source = opened(cache=cache)
    assert source.fingerprint() == whole.fingerprint()
    assert hashes(source) == {name: source.published_sha256(name) for name in source.sizes}
    assert source.aux_files()["LICENSE"] == hub.contents["LICENSE"]
    remote = {name for name in source.sizes if source.remote_bytes(name)}
    assert remote == {SHARD, "model-00003-of-00004.safetensors"}
    assert {r.file for r in hub.requests} == {*remote, "LICENSE", None}


def test_another_commit_in_the_cache_is_of_no_use(opened: Open, cache: Path) -> None:
    source = opened("v1", cache=cache)
    assert source.remote_bytes(SHARD) == source.sizes[SHARD]


def test_a_cached_file_that_changes_underneath_is_noticed(
    opened: Open, cache: Path, snapshot: Path
) -> None:
    source = opened(cache=cache)
    os.truncate(snapshot / SHARD, 5)
    with pytest.raises(SourceError, match=f"{SHARD} is 5 bytes long, but was"):
        hashes(source)


def test_offline_all_comes_from_the_cache(
    hub: Loopback, opened: Open, cache: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = opened(cache=cache)
    fingerprint, described = online.fingerprint(), online.description(hashes(online))
    # The library may keep a blob in a store shared by repositories, under another hash.
    blob = snapshot / (snapshot / SHARD).readlink()
    shared = cache / "blobs" / "00" / ("0" * 64)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", COMMIT):
        source = HubSource(hub.repo, revision, cache=cache, endpoint=NOWHERE)
        assert source.commit == COMMIT
        assert source.fingerprint() == fingerprint
        assert source.description(hashes(source)) == described
        for name in source.sizes:
            assert source.published_sha256(name) == online.published_sha256(name)
            assert source.remote_bytes(name) == 0
    assert hub.requests == []


@pytest.mark.usefixtures("offline")
def test_offline_says_what_is_missing(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"@main is not in the hub's cache and offline mode is s"):
        opened(cache=tmp_path / "empty")


def test_offline_a_part_is_not_enough(
    opened: Open, cache: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("v1", OLD_COMMIT, "../../../etc/passwd"):
        with pytest.raises(SourceError, match="is not in the hub's cache and offline mode is set"):
            opened(revision, cache=cache)
    (snapshot / "tokenizer.json").resolve().write_text("x")
    with pytest.raises(SourceError, match=r"tokenizer\.json does not have the hash it is named"):
        opened(cache=cache).aux_files()
    (snapshot / SHARD).resolve().unlink()
    with pytest.raises(SourceError, match=f"1 of 4 .* \\({SHARD}\\); download .*HF_HUB_OFFLINE"):
        opened(cache=cache)
    (snapshot / "config.json").unlink()
    with pytest.raises(SourceError, match="is not in the hub's cache and offline mode is set"):
        opened(cache=cache)


def test_the_hub_of_the_library_is_the_default(
    hub: Loopback, patience: Patience, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    isolate(monkeypatch, tmp_path, hub.endpoint)
    assert hashes(HubSource(hub.repo, patience=patience))


# As a process of its own

READ = """
import hashlib, json, sys
from dsv4.convert.sources.open import open_source
source = open_source(sys.argv[1])
print(json.dumps([type(source).__name__, source.fingerprint()]))
"""


def test_the_environment_is_honoured(
    checkpoint: Path, tmp_path: Path, patience: Patience, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(checkpoint, access="private") as hub:
        snapshot_download(
            hub.repo, endpoint=hub.endpoint, token=TOKEN, cache_dir=tmp_path / "other"
        )
        expected = HubSource(hub.repo, endpoint=hub.endpoint, token=TOKEN, patience=patience)
        command = [sys.executable, "-c", READ, hub.repo]
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "DO_NOT_TRACK": "1"}
        for extra in (
            {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN},
            {
                "HF_ENDPOINT": NOWHERE,
                "HF_HUB_CACHE": str(tmp_path / "other"),
                "HF_HUB_OFFLINE": "1",
            },
        ):
            hub.requests.clear()
            done = subprocess.run(
                command, env=environment | extra, capture_output=True, text=True, check=False
            )
            assert done.stderr == ""
            assert json.loads(done.stdout) == ["HubSource", expected.fingerprint()]
            assert bool(hub.requests) == ("HF_TOKEN" in extra)


def test_the_library_is_imported_for_hub_ids_only(checkpoint: Path) -> None:
    program = READ + "assert 'huggingface_hub' not in sys.modules"
    command = [sys.executable, "-c", program, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith('["LocalSource"'), done.stderr
    assert done.stderr == ""
