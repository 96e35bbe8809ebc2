"""Server-sent events: bytes as each client wants them, kept alive, ended when nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

KEEP_ALIVE_SECONDS = 10.0
WRITE_SECONDS = 60.0  # that one write may wait for a slow reader
COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event on the wire. name: for clients that look at the `event:` line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """An ASGI response that sends `events` as they come.

    keep_alive: what is sent when nothing came for a while. gone: called once when the client has
    left, or reads too slowly.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        keep_alive: Callable[[], bytes],
        gone: Callable[[], None],
    ) -> None:
        self._events, self._keep_alive, self._gone = events, keep_alive, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client is gone."""
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self._gone()
        except asyncio.CancelledError:
            self._gone()
            raise
        finally:
            for task in (writing, watching):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(watching, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await writing

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        events = aiter(self._events)
        waiting = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=KEEP_ALIVE_SECONDS)
                part = waiting.result() if done else self._keep_alive()
                if part is None:
                    break
                await self._send(send, part)
                if done:
                    waiting = asyncio.ensure_future(anext(events, None))
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await events.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, part: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except (TimeoutError, OSError):
            self._gone()
            raise asyncio.CancelledError from None


async def until_gone(receive: Receive) -> None:
    """Return when the client has left. The body of the request was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
