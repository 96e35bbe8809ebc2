"""Hubs that are not quite the hub: moved names, no sizes in the listing, tags of a server."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert.sources import ranges
from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub import HubSource
from dsv4.formats.errors import NetworkError, SourceError
from tests.convert.hub.conftest import Open, Waits
from tests.convert.hub.loopback import (
    FOREVER,
    TOKEN,
    Answer,
    Change,
    Loopback,
    says,
    serve,
)

SHARD = "model-00002-of-00004.safetensors"
OLD = "old-org/old-model"


def streamed(source: HubSource, name: str = SHARD) -> str:
    view = memoryview(bytearray(source.sizes[name]))
    with source.stream(name) as stream:
        stream.readinto(view)
    return hashlib.sha256(view).hexdigest()


def _listed(hub: Loopback, name: str) -> dict[str, Any]:
    return next(listed for listed in hub.listing if listed["rfilename"] == name)


# Moved repositories


def test_a_moved_repository_is_followed_and_named(
    hub: Loopback, opened: Open, patience: Patience
) -> None:
    hub.faults.plant(says(307, Location=f"/api/models/{hub.repo}?blobs=true"), host="api")
    moved = HubSource(OLD, endpoint=hub.endpoint, patience=patience)
    assert moved.notices == (
        f"{OLD} is called {hub.repo} on the hub now, and is read and recorded under that name",
    )
    direct = opened()
    assert direct.notices == ()
    assert moved.fingerprint() == direct.fingerprint()
    assert moved.origin == direct.origin
    assert streamed(moved) == moved.published_sha256(SHARD)
    assert [r.path for r in hub.requests if OLD in r.path] == [f"/api/models/{OLD}?blobs=true"]


def test_a_moved_private_repository_gets_the_token(checkpoint: Path, patience: Patience) -> None:
    with serve(checkpoint, access="private") as hub:
        hub.faults.plant(says(307, Location=f"/api/models/{hub.repo}?blobs=true"), host="api")
        moved = HubSource(OLD, endpoint=hub.endpoint, token=TOKEN, patience=patience)
        assert streamed(moved) == moved.published_sha256(SHARD)


@pytest.mark.parametrize("name", ["../x", "x", 5, None, "a/b/c"])
def test_a_name_that_is_none_is_not_followed(
    hub: Loopback, patience: Patience, name: object
) -> None:
    def renamed(answer: Answer) -> None:
        answer.body = json.dumps(json.loads(answer.body) | {"id": name}).encode()

    hub.faults.plant(says(307, Location=f"/api/models/{hub.repo}?blobs=true"), host="api")
    hub.faults.plant(renamed, host="api")
    with pytest.raises(SourceError, match=f"^{OLD}: the answer of .* is not a hub's"):
        HubSource(OLD, endpoint=hub.endpoint, patience=patience)


# Listings without sizes


def _without(hub: Loopback, *fields: str) -> None:
    for listed in hub.listing:
        for field in fields:
            listed.pop(field, None)


@pytest.mark.parametrize("fields", [("size",), ("size", "lfs"), ("size", "lfs", "blobId")])
def test_sizes_that_are_not_listed_are_asked_for(
    hub: Loopback, opened: Open, fields: tuple[str, ...]
) -> None:
    whole = opened()
    hub.requests.clear()
    _without(hub, *fields)
    source = opened()
    assert source.sizes == whole.sizes
    assert source.fingerprint() == whole.fingerprint()  # the hashes are found out as well
    assert streamed(source) == source.published_sha256(SHARD)
    asked = {request.file for request in hub.requests if request.method == "HEAD"}
    lfs_has_one = fields == ("size",)
    assert (SHARD in asked) is not lfs_has_one
    assert "config.json" in asked
    assert not {r.host for r in hub.requests if r.method == "HEAD"} & {"storage"}


def test_one_size_that_is_null_is_asked_for(hub: Loopback, opened: Open, waits: Waits) -> None:
    _listed(hub, "LICENSE")["size"] = None
    hub.faults.plant(says(503), host="hub", file="LICENSE")
    assert opened().aux_files()["LICENSE"] == hub.contents["LICENSE"]
    assert [r.file for r in hub.requests if r.method == "HEAD"] == ["LICENSE"] * 2
    assert len(waits.seconds) == 1


def test_a_relative_redirect_is_followed_for_a_size(hub: Loopback, opened: Open) -> None:
    _listed(hub, "LICENSE")["size"] = None
    there = f"/{hub.repo}/resolve/{hub.commit}/LICENSE"
    hub.faults.plant(says(307, Location=there), host="hub", file="LICENSE", times=3)
    assert opened().aux_files()["LICENSE"] == hub.contents["LICENSE"]


def test_the_first_word_on_a_size_counts(hub: Loopback, opened: Open) -> None:
    def leads_nowhere(answer: Answer) -> None:
        answer.headers["Location"] = "/nowhere"

    del _listed(hub, SHARD)["size"], _listed(hub, SHARD)["lfs"]
    hub.faults.plant(leads_nowhere, host="hub", file=SHARD)
    source = opened()
    assert source.sizes[SHARD] == len(hub.contents[SHARD])
    assert streamed(source) == source.published_sha256(SHARD)


@pytest.mark.parametrize("location", ["", "http://127.0.0.1:9/x"])
def test_a_size_that_nobody_says_is_said(hub: Loopback, opened: Open, location: str) -> None:
    def silent(answer: Answer) -> None:
        answer.headers = {"Location": location} if location else {}
        answer.status, answer.framed = (302 if location else 200), True

    _listed(hub, "LICENSE")["size"] = None
    hub.faults.plant(silent, host="hub", file="LICENSE", times=FOREVER)
    with pytest.raises(SourceError, match=r"LICENSE: neither the listing nor .* how large it is"):
        opened()


def test_a_size_that_does_not_come_is_the_network_s(hub: Loopback, opened: Open) -> None:
    _listed(hub, "LICENSE")["size"] = None
    hub.faults.plant(says(503), host="hub", file="LICENSE", times=FOREVER)
    with pytest.raises(NetworkError, match=r"LICENSE cannot be read: the answer of .* was 503"):
        opened()


# Tags


def _tags(make: str) -> Change:
    """Every answer has a tag of its own; `{}` stands for its number."""
    count = itertools.count()

    def change(answer: Answer) -> None:
        answer.headers.pop("X-Linked-Etag", None)
        answer.headers["ETag"] = make.format(next(count))

    return change


@pytest.mark.parametrize("lfs", [True, False])
@pytest.mark.parametrize("make", ['"5f3a-{}"', '"0123456789abcdef0123456789abcde{}-2"', "W/{}"])
def test_servers_with_tags_of_their_own_are_believed(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch, lfs: bool, make: str
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 30_000)
    if not lfs:
        del _listed(hub, SHARD)["lfs"]
    for host in ("hub", "storage"):
        hub.faults.plant(_tags(make), host=host, file=SHARD, times=FOREVER)
    source = opened()
    assert (source.published_sha256(SHARD) is not None) is lfs
    assert streamed(source) == hashlib.sha256(hub.contents[SHARD]).hexdigest()
    assert len(hub.ranges(SHARD)) > 3


@pytest.mark.parametrize("digits", [40, 64])
def test_a_tag_that_is_a_hash_stays_what_it_was_where_nothing_is_published(
    hub: Loopback, opened: Open, digits: int
) -> None:
    del _listed(hub, SHARD)["lfs"]
    for host in ("hub", "storage"):
        hub.faults.plant(_tags(f'"{"0" * (digits - 1)}{{}}"'), host=host, file=SHARD, times=FOREVER)
    source = opened()
    with pytest.raises(SourceError, match=f"{SHARD} changed while it was read"):
        streamed(source)


def test_a_tag_is_nothing_beside_a_published_hash(hub: Loopback, opened: Open) -> None:
    hub.faults.plant(_tags(f'"{"0" * 63}{{}}"'), file=SHARD, times=FOREVER)
    source = opened()
    assert streamed(source) == source.published_sha256(SHARD)
