"""What a repository says about itself is taken at none of its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv4.convert.sources import hub as hub_source
from dsv4.convert.sources import hub_listing
from dsv4.convert.sources.base import INDEX_FILE
from dsv4.convert.sources.http import Patience
from dsv4.formats.errors import NetworkError, SourceError
from tests.convert.hub.conftest import Open, Waits
from tests.convert.hub.loopback import (
    FOREVER,
    Answer,
    Change,
    Loopback,
    cuts,
    says,
    stalls,
    with_body,
)

SHARD = "model-00002-of-00004.safetensors"

Damage = Callable[[Loopback], object]


def _listed(hub: Loopback, name: str) -> dict[str, Any]:
    return next(listed for listed in hub.listing if listed["rfilename"] == name)


def _lists(name: str, **fields: Any) -> Damage:
    return lambda hub: _listed(hub, name).update(fields)


def _serves(name: str, data: bytes) -> Damage:
    """Other content, and a listing that is right about it."""

    def apply(hub: Loopback) -> None:
        hub.contents[name] = data
        _listed(hub, name).update(hub._listed(name))

    return apply


def _answers(change: Change) -> Damage:
    return lambda hub: hub.faults.plant(change, host="api")


def _document(value: Any) -> Damage:
    if isinstance(value, dict):
        value = {"id": "some-org/some-model"} | value
    return _answers(with_body(lambda _: json.dumps(value).encode()))


def _hides(name: str) -> Damage:
    return lambda hub: hub.listing.remove(_listed(hub, name))


def _sends(name: str, change: Change, host: str = "hub") -> Damage:
    return lambda hub: hub.faults.plant(change, host=host, file=name)


def _index(hub: Loopback) -> None:
    index = json.loads(hub.contents[INDEX_FILE])
    index["weight_map"]["head.weight"] = "../x.safetensors"
    _serves(INDEX_FILE, json.dumps(index).encode())(hub)


def _sibling(**fields: Any) -> dict[str, Any]:
    return {"sha": "c" * 40, "siblings": [{"rfilename": "config.json", "size": 5} | fields]}


def _renamed_to_a_path(hub: Loopback) -> None:
    _listed(hub, SHARD)["rfilename"] = f"../{SHARD}"


NOT_A_HUB = "is not a hub's .*; check HF_ENDPOINT"

REFUSED: dict[str, tuple[Damage, str]] = {
    "no JSON": (_answers(with_body(lambda _: b"<html>")), NOT_A_HUB),
    "a list": (_document([]), NOT_A_HUB),
    "deep": (_answers(with_body(lambda _: b"[" * 100_000)), NOT_A_HUB),
    "a commit that is none": (_document({"sha": "../../x", "siblings": []}), NOT_A_HUB),
    "no commit": (_document({"siblings": []}), NOT_A_HUB),
    "files that are no list": (_document({"sha": "c" * 40, "siblings": 5}), NOT_A_HUB),
    "a file without name": (_document({"sha": "c" * 40, "siblings": [{}]}), NOT_A_HUB),
    "a name that is a number": (_document(_sibling(rfilename=5)), NOT_A_HUB),
    "a size that is text": (_document(_sibling(size="5")), NOT_A_HUB),
    "a negative size": (_document(_sibling(size=-5)), NOT_A_HUB),
    "a blob id that is none": (_document(_sibling(blobId="x")), NOT_A_HUB),
    "a hash that is none": (
        _document(_sibling(lfs={"sha256": "x", "size": 5, "pointerSize": 1})),
        NOT_A_HUB,
    ),
    "no files": (_document({"sha": "c" * 40}), "is not a checkpoint: it has no config.json; give"),
    "no config": (_hides("config.json"), "has safetensors files but no config.json; put"),
    "a shard missing": (
        _hides(SHARD),
        f"1 of 4 safetensors files are missing \\({SHARD}\\); choose another revision",
    ),
    "a shard that is a path": (
        _renamed_to_a_path,
        f"1 of 4 safetensors files are missing \\({SHARD}\\); choose another revision",
    ),
    "a shard said to be longer": (
        _lists(SHARD, size=89_913),
        f"{SHARD}: bytes 0-89912/89913 were asked for, the answer has 'bytes 0-89911/89912'",
    ),
    "a shard said to be shorter": (
        _lists(SHARD, size=89_911),
        f"{SHARD}: bytes 0-89910/89911 were asked for, the answer has 'bytes 0-89910/89912'",
    ),
    "a shard said to be empty": (
        _lists(SHARD, size=0),
        f"{SHARD} is empty, expected a safetensors file",
    ),
    "a shard with another hash": (
        _lists(SHARD, lfs={"sha256": "0" * 64, "size": 89_912, "pointerSize": 134}),
        f"{SHARD} changed while it was read",
    ),
    "a gigantic config": (_lists("config.json", size=1 << 40), "config.json is larger than 16777"),
    "a gigantic index": (_lists(INDEX_FILE, size=1 << 40), f"{INDEX_FILE} is larger than 5368"),
    "a gigantic header": (
        _serves(SHARD, (1 << 62).to_bytes(8, "little") + b"{}" * 100),
        f"{SHARD} declares a header of {1 << 62} bytes, expected 2 to 100000000",
    ),
    "an index that names a path": (
        _index,
        r"'head.weight' is said to be in '../x.safetensors', expected the plain name",
    ),
    "config is no JSON": (_serves("config.json", b"{,}"), "config.json is not valid JSON"),
    "config of another hash": (
        _sends("config.json", with_body(lambda body: b" " + body[1:])),
        "config.json arrived with another hash than the repository lists",
    ),
    "redirected in a circle": (
        lambda hub: hub.faults.plant(
            says(302, Location=f"{hub.endpoint}/api/models/{hub.repo}"), host="api", times=FOREVER
        ),
        r"^127\.0\.0\.1:\d+ redirects without end; check HF_ENDPOINT",
    ),
    "418": (_answers(says(418)), "some-org/some-model cannot be read: the answer was 418"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_each_lie_is_refused_with_its_sentence(
    hub: Loopback, opened: Open, waits: Waits, damage: str
) -> None:
    apply, sentence = REFUSED[damage]
    apply(hub)
    with pytest.raises(SourceError, match=sentence) as refusal:
        opened()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600
    assert waits.seconds == []
    for request in hub.requests:
        assert ".." not in request.path


def test_a_gigantic_header_is_not_fetched(hub: Loopback, opened: Open) -> None:
    size = hub_source.HEAD_BYTES * 2
    _serves(SHARD, (1 << 62).to_bytes(8, "little") + bytes(size))(hub)
    with pytest.raises(SourceError, match="declares a header of"):
        opened()
    assert hub.bytes_served(SHARD) == hub_source.HEAD_BYTES


def test_too_many_files_are_refused(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_listing, "MAX_SHARDS", 5)
    with pytest.raises(SourceError, match="it lists 8 files"):
        opened()


@pytest.mark.parametrize(
    "change", [says(503), says(429, Retry_After="3"), cuts(0), cuts(50), stalls(None, 1.0)]
)
def test_a_listing_is_waited_for(hub: Loopback, opened: Open, waits: Waits, change: Change) -> None:
    hub.faults.plant(change, host="api", times=3)
    source = opened(patience=Patience(read=0.5, sleep=waits))
    assert len(source.sizes) == 4
    assert len(waits.seconds) >= 3


def test_a_hub_that_is_down_is_given_up(hub: Loopback, opened: Open, waits: Waits) -> None:
    hub.hub.stop()
    try:
        sentence = r"^some-org/some-model cannot be read: no connection to 127\.0\.0\.1:\d+: "
        with pytest.raises(NetworkError, match=sentence):
            opened()
        assert len(waits.seconds) == 5
    finally:
        hub.hub.start()


def test_a_small_file_may_come_whole(hub: Loopback, opened: Open) -> None:
    def whole(answer: Answer) -> None:
        answer.status = 200
        del answer.headers["Content-Range"]

    hub.faults.plant(whole, host="hub", file="config.json", times=FOREVER)
    assert opened().config
    hub.faults.plant(cuts(100), host="hub", file=INDEX_FILE)
    assert opened().entries


def test_a_shard_outside_lfs_has_no_published_hash(hub: Loopback, opened: Open) -> None:
    del _listed(hub, SHARD)["lfs"]
    source = opened()
    assert source.published_sha256(SHARD) is None
    source.read_into(SHARD, 0, memoryview(bytearray(10)), "x")
    hub.contents[SHARD] = bytes(source.sizes[SHARD])
    with pytest.raises(SourceError, match="changed while it was read"):
        source.read_into(SHARD, 0, memoryview(bytearray(10)), "x")
