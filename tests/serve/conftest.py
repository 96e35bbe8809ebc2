"""A server that says what a test tells it to say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.jobs import Job
from tests.support.serving import TOKENIZER, Live, ScriptedEngine, live

TOOL_CALL = (
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


class Script:
    """What the engine says: texts in the order of the jobs, the last one again and again."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self.texts: list[str] = ["Hello."]
        self.failure: str | None = None

    def say(self, *texts: str) -> None:
        """From the next job on."""
        self.texts = list(texts)

    def __call__(self, job: Job) -> Sequence[int] | str:
        """For `ScriptedEngine`."""
        if self.failure is not None:
            return self.failure
        return self._text.encode(self.texts.pop(0) if len(self.texts) > 1 else self.texts[0])


@pytest.fixture(scope="session")
def text() -> Text:
    """The tiny tokenizer."""
    return Text.from_file(TOKENIZER)


@pytest.fixture
def script(text: Text) -> Script:
    """Of the `served` server's engine."""
    return Script(text)


@pytest.fixture
def served(script: Script) -> Iterator[Live]:
    """A server with a scripted engine, which does not reason unless asked to."""
    with live(ScriptedEngine(script, cached=2)) as running:
        yield running
