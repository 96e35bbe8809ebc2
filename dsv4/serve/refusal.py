"""A request that is not answered as asked: one sentence, a status, and the field, in either shape.

OpenAI's clients read `{"error": {"message", "type", "param", "code"}}`, Anthropic's
`{"type": "error", "error": {"type", "message"}}`.
"""

from __future__ import annotations

import json
from typing import Any

from deepseek_recipe import ConversionError

from dsv4.formats.errors import Dsv4Error, QueueFull, RuntimeRefusal

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_exceeded",
}
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """What goes to the client.

    param: the field that is at fault. code: OpenAI's, for programs. retry_after: seconds after
    which the same request may be answered; None when it is not worth trying again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def for_the_log(self) -> str:
        """What happened, without what the client wrote, which the message may quote."""
        if self.status >= 500:
            return self.message
        return " ".join(filter(None, (self.code or str(self.status), self.param)))

    @property
    def headers(self) -> dict[str, str]:
        """Whether and when the clients' libraries try again."""
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        # A fault that would come again costs three prompts where a library retries it twice.
        return {"x-should-retry": "false"} if self.status >= 500 else {}

    def openai(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        kind = OPENAI_TYPES.get(self.status, fallback)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic(self) -> dict[str, Any]:
        """As Anthropic's clients read it."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        named = f"{self.param}: {self.message}" if self.param else self.message
        return {"type": "error", "error": {"type": kind, "message": named}}


def invalid(param: str | None, message: str) -> Refusal:
    """A field with a value that it cannot have."""
    return Refusal(400, message, param=param, code="invalid_value")


def unsupported(param: str, message: str) -> Refusal:
    """A field that is known and not honoured: refused by name, never ignored."""
    return Refusal(400, message, param=param, code="unsupported_parameter")


def too_long(prompt_tokens: int, asked: int | None, room: int) -> Refusal:
    """A prompt that leaves no room, with or without the answer that is `asked` for."""
    more = "" if asked is None else f" and {asked} for the answer"
    return Refusal(
        400,
        f"this model's maximum context length is {room} tokens, and the request has "
        f"{prompt_tokens} tokens in its prompt{more}; shorten one of them",
        param="messages",
        code="context_length_exceeded",
    )


def refusal_of(error: Exception) -> Refusal | None:
    """What an error of ours, of the engine's or of the recipe's means to a client.

    None for a fault of the server's own.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ConversionError):
        return _converted(error)
    if isinstance(error, QueueFull):
        return Refusal(429, str(error), code="rate_limit_exceeded", retry_after=1)
    if isinstance(error, RuntimeRefusal):
        return Refusal(400, str(error))
    if isinstance(error, Dsv4Error):
        return Refusal(500, str(error))
    return None


def _converted(error: ConversionError) -> Refusal:
    try:
        found = json.loads(error.body)["error"]
    except (ValueError, KeyError, TypeError):
        return Refusal(error.status_code, str(error))
    message, param = str(found.get("message") or error), found.get("param")
    if param is None and message.startswith("Invalid json schema"):
        param = "response_format"  # the recipe names no field
    return Refusal(
        error.status_code,
        message,
        param=param,
        code=found.get("code"),
    )
