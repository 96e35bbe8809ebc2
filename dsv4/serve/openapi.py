"""What the server takes and gives, as an OpenAPI description: `/openapi.json`.

It is made of the tables that requests are read by, so that it says what is checked. Fields that it
does not name are ignored or refused by name (`knobs.NEUTRAL`).
"""

from __future__ import annotations

from typing import Any

from dsv4.serve.knobs import (
    BAN,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    NUMBERS,
    SEEDS,
)
from dsv4.serve.messages import ASKED_TOKENS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_STOPS: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
        {
            "type": "array",
            "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
        },
        {"type": "null"},
    ]
}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": _TEXT},
    },
}


def _integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _knobs(vocab: int) -> Schema:
    """Fields that say how an answer is drawn, of every face."""
    found: Schema = {
        name: {"type": ["number", "null"], "exclusiveMinimum" if above else "minimum": low}
        | {"maximum": high}
        for name, (low, high, above) in NUMBERS.items()
    }
    return found | {
        "top_k": _integer(-1, vocab),
        "seed": _integer(0, SEEDS - 1),
        "min_tokens": _integer(0, 1 << 20),
        "ignore_eos": _FLAG,
        "stream": _FLAG,
        "logit_bias": {
            "type": ["object", "null"],
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": BAN, "maximum": -BAN},
        },
    }


def _requests(vocab: int) -> dict[str, tuple[str, list[str], Schema]]:
    """Route -> what it does, the fields that it needs, and fields besides `_knobs`."""
    tokens, choices = _integer(1, MAX_TOKENS), _integer(1, MAX_CHOICES)
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    ids["items"]["maximum"] = vocab - 1  # type: ignore[index]
    chat = {"messages": _MESSAGES, "max_tokens": tokens, "max_completion_tokens": tokens}
    completion = {"prompt": {"anyOf": [_TEXT, ids]}, "max_tokens": _integer(0, MAX_TOKENS)}
    return {
        "/v1/chat/completions": (
            "A turn of a chat, in OpenAI's chat completions",
            ["messages"],
            chat | {"n": choices, "stop": _STOPS, "logprobs": _FLAG},
        ),
        "/v1/completions": (
            "What follows a text, in OpenAI's completions",
            ["prompt"],
            completion
            | {"n": choices, "stop": _STOPS, "echo": _FLAG}
            | {"logprobs": _integer(0, MAX_TOP_LOGPROBS)},
        ),
        "/v1/responses": (
            "A turn, in OpenAI's responses; nothing is stored",
            ["input"],
            {"input": {"anyOf": [_TEXT, _MESSAGES]}, "max_output_tokens": tokens},
        ),
        "/v1/messages": (
            "A turn, in Anthropic's messages",
            ["messages", "max_tokens"],
            {"messages": _MESSAGES, "max_tokens": {"type": "integer"} | _integer(1, ASKED_TOKENS)},
        ),
        "/v1/messages/count_tokens": (
            "Tokens of such a request",
            ["messages"],
            {"messages": _MESSAGES},
        ),
    }


def description(name: str, vocab: int) -> Schema:
    """OpenAPI 3.1 of a server of the model `name`, whose ids are below `vocab`."""
    paths: Schema = {path: {"get": _route(about, kind)} for path, (about, kind) in _READ.items()}
    for path, (about, needed, fields) in _requests(vocab).items():
        body = {
            "type": "object",
            "required": needed,
            "properties": {"model": {"enum": [name, None]}} | _knobs(vocab) | fields,
        }
        paths[path] = {
            "post": _route(about, "application/json", "text/event-stream")
            | {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"dsv4: {name}", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


_READ = {
    "/health": ("Whether the server lives", "application/json"),
    "/ready": ("Whether it answers, and how far it is", "application/json"),
    "/metrics": ("Figures for Prometheus", "text/plain"),
    "/v1/models": ("Models that it serves", "application/json"),
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": _TEXT, "message": {"type": "string", "minLength": 1}},
        }
    },
}
_REFUSALS = {
    "400": "The request cannot be, or asks for what is not honoured; the message says which field",
    "401": "The API key is missing or wrong",
    "403": "The Host or Origin header names another machine",
    "404": "There is no such model",
    "413": "The body is larger than it may be",
    "429": "As many wait as may; Retry-After says when to ask again",
    "503": "The model is loading, or the engine has failed",
    "504": "The answer took longer than it may",
}


def _route(about: str, *kinds: str) -> Schema:
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    told: Schema = {"200": {"description": about, "content": {kind: {} for kind in kinds}}}
    for status, why in _REFUSALS.items():
        told[status] = {"description": why, "content": refusal}
    return {"summary": about, "responses": told}
