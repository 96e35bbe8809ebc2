"""The body of a request: read within limits, and JSON that cannot hurt what reads it next."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from dsv4.serve.refusal import Refusal

MAX_DEPTH = 64
MAX_VALUES = 500_000  # objects and arrays, or names: a second in which nothing else runs
SECONDS = 30.0  # to send a body


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request. most: bytes.

    Raises Refusal 413 for a body that is too large, 408 for one that does not come, 400 for one
    that is not a JSON object.
    """
    raw = await _read(request, most)
    if raw.count(b"[") + raw.count(b"{") > MAX_VALUES or raw.count(b'":') > MAX_VALUES:
        raise Refusal(400, f"the body has more than {MAX_VALUES:,} objects, arrays or names")
    try:
        body = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise Refusal(400, f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    _check_depth(body)
    return body


async def _read(request: Request, most: int) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {SECONDS:g} s") from None
    return b"".join(parts)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body has more than the {most} bytes that this server reads")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(body: Any) -> None:
    level = [body]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise Refusal(400, f"the body is nested deeper than {MAX_DEPTH} levels")
