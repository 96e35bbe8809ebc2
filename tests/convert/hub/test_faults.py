"""Whatever the network does, a stream yields the right bytes or one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from dsv4.convert.sources import hub as hub_source
from dsv4.convert.sources import hub_client, ranges
from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub import HubSource
from dsv4.convert.sources.hub_login import Login
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
    with_header,
)

SHARD = "model-00002-of-00004.safetensors"
RANGE = 30_000
HEAD = 1_000


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(hub_source, "HEAD_BYTES", HEAD)


@pytest.fixture
def source(opened: Open) -> HubSource:
    """Opened before any fault is planted."""
    return opened()


def streamed(source: HubSource, step: int = 7_777) -> bytes:
    view = memoryview(bytearray(source.sizes[SHARD]))
    with source.stream(SHARD) as stream:
        for at in range(0, len(view), step):
            stream.readinto(view[at : at + step])
    return bytes(view)


def test_the_file_is_large_enough_to_tell(source: HubSource, hub: Loopback) -> None:
    size = source.sizes[SHARD]
    assert 2 * RANGE < size < 3 * RANGE
    before = hub.bytes_served(SHARD)
    assert streamed(source) == hub.contents[SHARD]
    assert hub.bytes_served(SHARD) - before == size
    assert hub.ranges(SHARD)[-3:] == [(0, RANGE), (RANGE, 2 * RANGE), (2 * RANGE, size)]


PASSING: dict[str, tuple[Change, dict[str, Any]]] = {
    "cut in the body": (cuts(10_000), {}),
    "cut in the second range": (cuts(10_000), {"skip": 1}),
    "cut before the body": (cuts(0), {}),
    "cut before the body, five times": (cuts(0), {"times": 5}),
    "cut in every answer": (cuts(9_999), {"times": FOREVER}),
    "body shorter than promised": (with_body(lambda body: body[:-5]), {}),
    "body short, without a length": (with_body(lambda body: body[:-5], framed=True), {}),
    "right body, without a length": (with_body(lambda body: body, framed=True), {}),
    "bytes after the promised end": (with_body(lambda body: body + b"more"), {}),
    "stalled body": (stalls(5_000, 1.0), {}),
    "no answer": (stalls(None, 1.0), {}),
    "429": (says(429), {}),
    "500": (says(500), {}),
    "502": (says(502), {}),
    "503 five times": (says(503), {"times": 5}),
    "504 of the hub": (says(504), {"host": "hub"}),
    "hub cut": (cuts(0), {"host": "hub"}),
}
SENT_IN_VAIN = {"no answer", "bytes after the promised end"}  # to a client that had gone


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(
    hub: Loopback, opened: Open, patience: Patience, fault: str
) -> None:
    source = opened(patience=dataclasses.replace(patience, read=0.5))
    before = hub.bytes_served(SHARD)
    change, where = PASSING[fault]
    hub.faults.plant(change, file=SHARD, **where)
    assert streamed(source) == hub.contents[SHARD]
    if fault not in SENT_IN_VAIN:
        assert hub.bytes_served(SHARD) - before == source.sizes[SHARD]  # nothing twice


def test_a_cut_is_continued_where_it_broke(source: HubSource, hub: Loopback, waits: Waits) -> None:
    hub.faults.plant(cuts(10_000), file=SHARD, times=2)
    out = memoryview(bytearray(25_000))
    before = len(hub.ranges(SHARD))
    source.read_into(SHARD, 40_000, out, "x")
    assert out == hub.contents[SHARD][40_000:65_000]
    expected = [(40_000, 65_000), (50_000, 65_000), (60_000, 65_000)]
    assert hub.ranges(SHARD)[before:] == expected
    assert len(waits.seconds) == 2


def _gains(total: int) -> Change:
    return with_header("Content-Range", f"bytes 0-{RANGE - 1}/{total}")


def _whole(hub: Loopback) -> Change:
    def change(answer: Answer) -> None:
        answer.status, answer.body = 200, hub.contents[SHARD]
        del answer.headers["Content-Range"]

    return change


def _longer(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(len(answer.body) + 4)
    answer.body += b"more"


def _loops(hub: Loopback) -> Change:
    return says(302, Location=f"{hub.endpoint}/{hub.repo}/resolve/{hub.commit}/{SHARD}")


ASKED = "bytes 0-29999/89912 were asked for"

REFUSED: dict[str, tuple[Callable[[Loopback], Change], dict[str, Any], str]] = {
    "other offsets": (
        lambda hub: with_header("Content-Range", "bytes 1-30000/89912"),
        {},
        f"{ASKED}, the answer has 'bytes 1-30000/89912'",
    ),
    "another total": (lambda hub: _gains(89_913), {}, ASKED),
    "a total unknown": (
        lambda hub: with_header("Content-Range", "bytes 0-29999/*"),
        {},
        ASKED,
    ),
    "numbers without end": (
        lambda hub: with_header("Content-Range", f"bytes {'9' * 5000}-1/1"),
        {},
        ASKED,
    ),
    "no Content-Range": (lambda hub: with_header("Content-Range", ""), {}, ASKED),
    "longer than asked": (lambda hub: _longer, {}, "the answer promises '30004'"),
    "longer than asked, without a length": (
        lambda hub: with_body(lambda body: body + b"more", framed=True),
        {},
        "the answer is longer than the range asked for",
    ),
    "200 instead of 206": (_whole, {}, "the answer is 200 instead of 206"),
    "204": (lambda hub: says(204), {}, "the answer is 204 instead of 206"),
    "compressed": (
        lambda hub: with_header("Content-Encoding", "gzip"),
        {},
        "arrives with the content encoding 'gzip'",
    ),
    "416": (lambda hub: says(416), {}, "the answer was 416"),
    "418": (lambda hub: says(418), {}, "the answer was 418"),
    "401": (
        lambda hub: says(401),
        {"host": "hub"},
        "cannot be seen without a login; .* `hf auth login` or set HF_TOKEN",
    ),
    "403": (
        lambda hub: says(403),
        {},
        r"is refused by 127\.0\.0\.1:\d+, to which the hub redirects: the answer was 403; run the",
    ),
    "403 of the hub": (
        lambda hub: says(403, X_Error_Message="Access is disabled."),
        {"host": "hub"},
        r"is forbidden \(Access is disabled\); log in with `hf auth login` or set HF_TOKEN",
    ),
    "403 gated": (
        lambda hub: says(403, X_Error_Code="GatedRepo"),
        {"host": "hub"},
        "is gated; accept the licence on the page of some-org/some-model",
    ),
    "404": (
        lambda hub: says(404, X_Error_Code="EntryNotFound"),
        {"host": "hub"},
        "is not in some-org/some-model, though it is listed",
    ),
    "redirected in a circle": (_loops, {"host": "hub", "times": FOREVER}, "more than 5 times"),
    "redirected nowhere": (lambda hub: says(302), {"host": "hub"}, "the answer was 302"),
    "redirected to nonsense": (
        lambda hub: says(302, Location="http://127.0.0.1:nonsense/x"),
        {"host": "hub"},
        "the answer was 302",
    ),
    "redirected to a file": (
        lambda hub: says(302, Location="file:///etc/passwd"),
        {"host": "hub"},
        "is redirected to a file address",
    ),
    "the hub's tag changes": (
        lambda hub: with_header("X-Linked-Etag", f'"{"0" * 64}"'),
        {"host": "hub", "skip": 1},
        "changed while it was read",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_wrong_is_refused_at_once(
    source: HubSource, hub: Loopback, waits: Waits, fault: str
) -> None:
    make, where, sentence = REFUSED[fault]
    hub.faults.plant(make(hub), file=SHARD, **where)
    asked = len(hub.requests)
    with pytest.raises(SourceError, match=sentence) as refusal:
        streamed(source)
    assert SHARD in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert waits.seconds == []
    assert len(hub.requests) - asked <= ranges.MAX_REDIRECTS + 1


GIVEN_UP: dict[str, tuple[Change, dict[str, Any], str]] = {
    "503": (says(503), {}, r"the answer of 127\.0\.0\.1:\d+ was 503"),
    "408": (says(408), {}, r"the answer of 127\.0\.0\.1:\d+ was 408"),
    "522": (says(522), {}, r"the answer of 127\.0\.0\.1:\d+ was 522"),
    "429 of the hub": (says(429, Retry_After="1"), {"host": "hub"}, r"127\.0\.0\.1:\d+ was 429"),
    "cut before the body": (cuts(0), {}, r"the connection to 127\.0\.0\.1:\d+ broke"),
    "empty, without a length": (with_body(lambda _: b"", framed=True), {}, "30000 bytes early"),
    "no answer": (stalls(None, 0.5), {}, r"127\.0\.0\.1:\d+ sends nothing"),
}


@pytest.mark.parametrize("fault", GIVEN_UP)
def test_what_does_not_pass_is_given_up(
    hub: Loopback, opened: Open, patience: Patience, waits: Waits, fault: str
) -> None:
    source = opened(patience=dataclasses.replace(patience, read=0.2))
    waits.seconds.clear()
    change, where, reason = GIVEN_UP[fault]
    hub.faults.plant(change, file=SHARD, times=FOREVER, **where)
    before = len(hub.ranges(SHARD))
    sentence = f"{SHARD} cannot be read: .*{reason}.* \\(6 failures in a row\\); check the network"
    with pytest.raises(NetworkError, match=sentence):
        streamed(source)
    assert len(waits.seconds) == 5
    assert len(hub.ranges(SHARD)) - before <= 6


def test_progress_renews_the_patience(source: HubSource, hub: Loopback, waits: Waits) -> None:
    for _ in range(5):
        hub.faults.plant(says(503), file=SHARD, times=4)
        hub.faults.plant(cuts(3_000), file=SHARD)
    assert streamed(source) == hub.contents[SHARD]
    assert len(waits.seconds) == 25


def test_waits_grow_and_honour_the_server(source: HubSource, hub: Loopback, waits: Waits) -> None:
    hub.faults.plant(says(503), file=SHARD, times=5)
    streamed(source)
    for n, seconds in enumerate(waits.seconds):
        assert 2**n / 2 <= seconds <= 2**n
    waits.seconds.clear()
    for after in ("7", "100000", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400):
        hub.faults.plant(says(429, Retry_After=after), file=SHARD, times=1)
    streamed(source)
    assert waits.seconds[0] == 7
    assert waits.seconds[1] == waits.seconds[4] == 300
    assert 0 < waits.seconds[2] < 10 > waits.seconds[3] > 0
    waits.seconds.clear()
    hub.faults.plant(says(429, ratelimit='"resolvers";r=0;t=55'), file=SHARD, host="hub")
    streamed(source)
    assert waits.seconds == [55]


def test_a_storage_that_is_down_for_a_while(source: HubSource, hub: Loopback, waits: Waits) -> None:
    hub.storage.stop()

    def restart() -> None:
        if len(waits.seconds) == 3:
            hub.storage.start()

    waits.meanwhile = restart
    try:
        assert streamed(source) == hub.contents[SHARD]
        assert len(waits.seconds) == 3
        hub.storage.stop()
        waits.meanwhile = lambda: None
        down = rf"{SHARD} cannot be read: no connection to 127\.0\.0\.1:\d+: .*refused"
        with pytest.raises(NetworkError, match=down):
            streamed(source)
    finally:
        hub.storage.start()


def test_a_file_that_changes_between_two_ranges(source: HubSource, hub: Loopback) -> None:
    with source.stream(SHARD) as stream:
        stream.readinto(memoryview(bytearray(RANGE)))
        hub.contents[SHARD] = os.urandom(source.sizes[SHARD])
        with pytest.raises(SourceError, match=f"{SHARD} changed while it was read"):
            stream.readinto(memoryview(bytearray(1)))


def test_wrong_bytes_do_not_have_the_published_hash(source: HubSource, hub: Loopback) -> None:
    published = source.published_sha256(SHARD)
    assert hashlib.sha256(streamed(source)).hexdigest() == published
    hub.faults.plant(with_body(lambda body: body[:-1] + b"x"), file=SHARD)
    assert hashlib.sha256(streamed(source)).hexdigest() != published


def test_reading_beyond_the_end_is_refused_without_asking(source: HubSource, hub: Loopback) -> None:
    asked = len(hub.requests)
    with pytest.raises(SourceError, match=f"{SHARD} ended while x was read"):
        source.read_into(SHARD, source.sizes[SHARD] - 1, memoryview(bytearray(2)), "x")
    with source.stream(SHARD) as stream, pytest.raises(SourceError, match="ended while it was"):
        stream.readinto(memoryview(bytearray(source.sizes[SHARD] + 1)))
    source.read_into(SHARD, source.sizes[SHARD], memoryview(b""), "nothing")
    assert len(hub.requests) == asked


def test_a_stream_left_early_leaves_no_connection_open(source: HubSource, hub: Loopback) -> None:
    for _ in range(150):  # more than the client's pool holds
        with source.stream(SHARD) as stream:
            stream.readinto(memoryview(bytearray(1)))
    assert streamed(source) == hub.contents[SHARD]


def test_never_from_https_back_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        body = httpx2.ByteStream(b"Found.")
        return httpx2.Response(302, headers={"Location": "http://elsewhere/x"}, stream=body)

    with httpx2.Client(transport=httpx2.MockTransport(answer)) as client:
        monkeypatch.setattr(hub_client, "get_session", lambda: client)
        reader = ranges.RangeReader(Login({}), Patience())
        file = ranges.RemoteFile("a/b", "x.safetensors", "https://hub/x", 10, None)
        with pytest.raises(SourceError, match=r"a/b/x\.safetensors is redirected to a http addre"):
            reader.read_into(file, 0, memoryview(bytearray(10)), "x")
