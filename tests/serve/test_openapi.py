"""What /openapi.json says is what the server does, by schemathesis; and it is a description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve import app
from dsv4.serve.knobs import KNOBS
from dsv4.serve.openapi import description
from tests.serve.conftest import Script
from tests.support.serving import Live, ScriptedEngine, live

schemathesis = pytest.importorskip("schemathesis")

ROUTES = sorted(description("tiny", 64)["paths"])


@pytest.fixture(scope="module")
def described(text: Text) -> Iterator[Live]:
    with live(ScriptedEngine(Script(text))) as running:
        yield running


def judge(served: Live, route: str, mode: str, count: int) -> None:
    """Send `count` requests to a route that are as described, or in one thing not."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    (method,) = description("tiny", 64)["paths"][route]
    modes, checks = schemathesis.GenerationMode, schemathesis.checks
    strategy = schema[route][method].as_strategy(generation_mode=modes(mode))
    # What is as described may still be too long for the model's room.
    excluded = [checks.CHECKS.get_one("positive_data_acceptance")]

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(case=strategy)
    def send(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded, timeout=30)

    send()


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_as_described(described: Live, route: str) -> None:
    judge(described, route, "positive", 15)


POSTS = [route for route in ROUTES if "post" in description("tiny", 64)["paths"][route]]


@pytest.mark.parametrize("route", POSTS)
def test_what_is_not_is_refused(described: Live, route: str) -> None:
    judge(described, route, "negative", 15)


def test_a_description_that_says_something_else_is_noticed(
    described: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what may be sent, and of what comes back."""

    def narrow(name: str, vocab: int) -> dict[str, Any]:
        found = description(name, vocab)
        schema = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
        schema["application/json"]["schema"]["properties"] = {
            "temperature": {"type": "number", "maximum": 0.1, "minimum": 0},
            "prompt": {"const": "x"},
        }
        del found["paths"]["/health"]["get"]["responses"]["200"]
        return found

    monkeypatch.setattr(app, "description", narrow)
    with pytest.raises(BaseExceptionGroup) as caught:
        judge(described, "/v1/completions", "negative", 100)
    assert "Invalid data should have been rejected" in str(caught.value.exceptions[0])
    with pytest.raises(BaseExceptionGroup) as caught:
        judge(described, "/health", "positive", 1)
    assert "Received: 200" in str(caught.value.exceptions[0])


def test_every_field_of_a_draw_is_described() -> None:
    paths = description("tiny", 64)["paths"]
    for route, without in (
        ("/v1/chat/completions", {"best_of"}),
        ("/v1/completions", {"best_of"}),
        ("/v1/responses", {"best_of", "n"}),
        ("/v1/messages", {"best_of", "n"}),
    ):
        content = paths[route]["post"]["requestBody"]["content"]["application/json"]
        assert set(KNOBS) - without <= content["schema"]["properties"].keys()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("route", POSTS)
def test_many_requests(described: Live, route: str, mode: str) -> None:
    judge(described, route, mode, 1000)
