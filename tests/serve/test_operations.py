"""Who may ask, what is bounded, what ends when: over a real socket."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv4.serve import sse
from dsv4.serve.jobs import Stats
from dsv4.serve.server import Access, Limits
from tests.serve.conftest import Script
from tests.support.serving import Live, ScriptedEngine, live, served_model

CHAT: Any = {"messages": [{"role": "user", "content": "hi"}]}
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 100},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": CHAT | {"max_tokens": 100},
}


def gauges(served: Live) -> dict[str, float]:
    page = served.client.get(f"{served.url}/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to hold within 5 s")


@pytest.fixture
def guarded(script: Script) -> Iterator[Live]:
    with live(ScriptedEngine(script), access=Access(("first", "second"))) as running:
        yield running


def test_everything_needs_a_key_but_health(guarded: Live) -> None:
    for path in ("/health", "/ready", "/"):
        assert guarded.client.get(guarded.url + path).status_code == 200
    for path in ("/metrics", "/v1/models", "/v1", "/nowhere", "/v1/models/tiny"):
        assert guarded.client.get(guarded.url + path).status_code == 401, path
    for path, body in ROUTES.items():
        assert guarded.post(path, body).status_code == 401
        assert guarded.post(path, body, authorization="Bearer wrong").status_code == 401
        assert guarded.post(path, body, authorization="Bearer second").status_code == 200
        assert guarded.post(path, body, **{"x-api-key": "first"}).status_code == 200
    # Nobody finds out by the cache what others asked.
    salts = {job.salt for job in guarded.engine.jobs}
    assert len(salts) == 2 and b"" not in salts


def test_what_was_said_to_one_key_is_not_found_with_another(guarded: Live, script: Script) -> None:
    script.say("secret</think>Hello.")
    think = {"thinking": {"type": "enabled"}, "tools": [_tool()]}
    first = guarded.post("/v1/chat/completions", CHAT | think, authorization="Bearer first").json()
    said = first["choices"][0]["message"]
    again = [*CHAT["messages"], {"role": "assistant", "content": said["content"]}]
    again.append({"role": "user", "content": "more"})
    for key, found in (("first", True), ("second", False)):
        body = think | {"messages": again}
        guarded.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
        prompt = guarded.text.decode(guarded.engine.jobs[-1].ids)
        assert ("secret" in prompt) == found


def _tool() -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"}}


def test_a_page_of_another_site_is_refused_without_a_key(script: Script) -> None:
    """A browser sends it without asking: a body of text/plain needs no leave."""
    access = Access(hosts=frozenset({"localhost", "127.0.0.1"}))
    with live(ScriptedEngine(script), access=access) as running:
        for origin, status in (
            ("https://example.org", 403),
            ("null", 403),
            (running.url, 200),
            ("http://localhost:3000", 200),
        ):
            headers = {"Origin": origin, "Content-Type": "text/plain"}
            body = {"prompt": "hi", "max_tokens": 2}
            content = json.dumps(body).encode()
            answer = running.client.post(
                f"{running.url}/v1/completions", content=content, headers=headers
            )
            assert answer.status_code == status, answer.text


def test_names_that_are_not_this_machines(script: Script) -> None:
    access = Access(hosts=frozenset({"localhost", "127.0.0.1"}))
    with live(ScriptedEngine(script), access=access) as served:
        for host, status in (("evil.example", 403), ("", 403), ("localhost:8000", 200)):
            answer = served.client.get(f"{served.url}/v1/models", headers={"host": host})
            assert answer.status_code == status, host


def test_ids_of_requests_come_back(served: Live) -> None:
    answer = served.post("/v1/chat/completions", CHAT, **{"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == answer.headers["request-id"] == "mine-1"
    forged = served.post("/v1/chat/completions", CHAT, **{"x-request-id": "x" * 65})
    assert forged.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"a": NaN}', 400),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": 5}]}', 400),
        (b"\xff", 400),
        (b" " * 2000, 413),
    ],
)
def test_bodies_that_cannot_be_read(script: Script, raw: bytes, status: int) -> None:
    with live(ScriptedEngine(script), limits=Limits(body=1000 if status == 413 else 1 << 20)) as it:
        for path in ROUTES:
            answer = it.client.post(it.url + path, content=raw)
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert "Traceback" not in error["message"]


def test_a_body_that_grows_beyond_the_bound(script: Script) -> None:
    with live(ScriptedEngine(script), limits=Limits(body=1000)) as served:

        def parts() -> Iterator[bytes]:
            yield from [b" " * 600] * 3

        answer = served.client.post(f"{served.url}/v1/chat/completions", content=parts())
        assert answer.status_code == 413


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_job(served: Live, path: str, stream: bool) -> None:
    served.engine.hold.set()
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as caller:
        body = json.dumps(ROUTES[path] | {"stream": stream}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        caller.sendall(head.encode() + body)
        until(lambda: gauges(served)["vllm:num_requests_running"] == 1)
    assert served.engine.cancels.get(timeout=5) is served.engine.jobs[0]
    until(lambda: gauges(served)["vllm:num_requests_running"] == 0)
    until(lambda: served.server.active == 0)


def test_an_answer_that_takes_too_long(script: Script) -> None:
    engine = ScriptedEngine(script)
    engine.hold.set()
    with live(engine, limits=Limits(seconds=0.1)) as served:
        assert served.post("/v1/chat/completions", CHAT).status_code == 504
        raw = served.raw("/v1/messages", ROUTES["/v1/messages"])
        assert raw.startswith("event: message_start") and "longer than" in raw
    assert engine.cancels.get(timeout=5)


@pytest.mark.parametrize(
    ("path", "sign"),
    [
        ("/v1/chat/completions", b": keep-alive\n\n"),
        ("/v1/completions", b": keep-alive\n\n"),
        ("/v1/responses", b"event: response.in_progress\n"),
        ("/v1/messages", b"event: ping\ndata: "),
    ],
)
def test_a_stream_is_kept_alive(
    served: Live, monkeypatch: pytest.MonkeyPatch, path: str, sign: bytes
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)
    served.engine.hold.set()
    with served.client.stream(
        "POST", served.url + path, json=ROUTES[path] | {"stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        got = b""
        for part in answer.iter_raw():
            got += part
            if got.count(sign) > 2:
                served.engine.hold.clear()
    assert got.count(sign) > 2


def test_metrics_by_vllms_names(served: Live) -> None:
    answer = served.post("/v1/chat/completions", CHAT).json()
    found = gauges(served)
    usage = answer["usage"]
    assert found["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
    assert found["vllm:generation_tokens_total"] == usage["completion_tokens"]
    assert found["vllm:prefix_cache_hits_total"] == 2 == found["vllm:prompt_tokens_cached_total"]
    assert found["vllm:request_success_total"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == usage["completion_tokens"] - 1
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    served.engine.most = 0
    assert served.post("/v1/chat/completions", CHAT).status_code == 429
    assert gauges(served)["vllm:admission_rejections_total"] == 1


def test_metrics_of_the_engine(served: Live) -> None:
    served.engine.counted = Stats(
        slots=8,
        kept=3,
        remembered_bytes=1 << 20,
        steps=9,
        drafted=4,
        draft_tokens=11,
        right_drafts=6,
        right_at=(4, 2, 0, 0, 0, 0, 0),
    )
    found = gauges(served)
    assert found["dsv4:slots"] == 8 and found["dsv4:slots_kept"] == 3
    assert found["dsv4:remembered_bytes"] == 1 << 20 and found["dsv4:steps_total"] == 9
    assert found["vllm:spec_decode_num_drafts_total"] == 4
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 11
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 6
    page = served.client.get(f"{served.url}/metrics").text
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [line for line in page.splitlines() if line.startswith(name)]
    assert [line.rpartition(" ")[2] for line in lines[:3]] == ["4.0", "2.0", "0.0"]
    assert 'position="0"' in lines[0] and 'model_name="tiny"' in lines[0]


def test_the_log_has_figures_and_nothing_that_was_said(
    served: Live, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.say("a-secret-answer")
    body = {"messages": [{"role": "user", "content": "a-secret-question"}]}
    with caplog.at_level(logging.INFO, "dsv4.serve"):
        for fields in ({}, {"stream": True}, {"temperature": "a-secret-value"}):
            served.post("/v1/chat/completions", body | fields, authorization="Bearer a-secret-key")
        until(lambda: len(caplog.messages) == 3)
    assert "a-secret" not in caplog.text
    lines = [json.loads(line) for line in caplog.messages]
    assert [line["status"] for line in lines] == [200, 200, 400]
    assert lines[2]["error"] == "invalid_value temperature"
    assert lines[0]["prompt_tokens"] == len(served.engine.jobs[0].ids)
    assert lines[0]["cached_tokens"] == 2 and lines[0]["finish"] == "stop"
    assert lines[0].keys() >= {"first_token_ms", "total_ms", "queue_ms", "client", "model"}


def test_a_server_that_loads(script: Script) -> None:
    with live(None, served_model()) as served:
        served.server.phase = "weights"
        state = served.client.get(f"{served.url}/ready")
        assert state.status_code == 503 and state.json()["phase"] == "weights"
        assert served.client.get(f"{served.url}/health").status_code == 200
        for path, body in ROUTES.items():
            answer = served.post(path, body)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        served.server.ready(ScriptedEngine(script))
        assert served.client.get(f"{served.url}/ready").status_code == 200
        assert served.post("/v1/chat/completions", CHAT).status_code == 200


def test_an_engine_that_has_failed(served: Live) -> None:
    served.engine.failure = "CUDA error 700"
    assert served.client.get(f"{served.url}/health").status_code == 503
    answer = served.post("/v1/chat/completions", CHAT)
    assert answer.status_code == 503 and "700" in answer.json()["error"]["message"]


def test_a_server_that_ends_takes_nothing_more(served: Live) -> None:
    served.server.drain()
    assert served.client.get(f"{served.url}/ready").status_code == 503
    answer = served.post("/v1/chat/completions", CHAT)
    assert answer.status_code == 503 and answer.headers["connection"] == "close"


def test_routes_that_are_not_there(served: Live) -> None:
    assert served.post("/v1/messages/batches", {}).json()["error"]["type"] == "not_found_error"
    assert served.client.get(f"{served.url}/v1/chat/completions").status_code == 405
    assert served.post("/v1/embeddings", {}).json()["error"]["code"] is None


def test_probes(served: Live) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    for method, path in (("HEAD", "/"), ("GET", "/v1"), ("HEAD", "/v1")):
        connection.request(method, path)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
    connection.close()


def test_a_fault_of_the_server_tells_nothing(
    served: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*arguments: object) -> None:
        raise ZeroDivisionError("at address 0x7f00")

    monkeypatch.setattr(served.engine, "submit_all", break_down)
    answer = served.post("/v1/chat/completions", CHAT)
    assert answer.status_code == 500 and "0x7f00" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "0x7f00" in caplog.text  # for the operator
