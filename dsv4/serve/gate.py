"""Before any route: who asks, under which id; after it: one line in the log.

Everything needs a key but the routes of `OPEN`: what is new is guarded without anybody's thinking
of it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv4.serve.record import LOG, Record
from dsv4.serve.refusal import Refusal
from dsv4.serve.server import Server, Stage

OPEN = frozenset({"/health", "/ready"})
PAGE = "/"  # holds nothing, and asks for a key itself
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class Gate:
    """ASGI middleware around the routes of `server`."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it; tell its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        client = scope.get("client") or ("",)
        record = Record(id, f"{scope['method']} {path}", client[0], headers.get("traceparent"))
        scope["dsv4.record"] = record

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                out = MutableHeaders(scope=message)
                # OpenAI's library reads the one, Anthropic's the other.
                out["x-request-id"] = out["request-id"] = id
                out["x-content-type-options"] = "nosniff"
                if self._server.stage is Stage.DRAINING:
                    out["connection"] = "close"
            await send(message)

        self._server.active += 1
        try:
            await self._admit(scope, headers, receive, told)
        finally:
            self._server.active -= 1
            if path not in _QUIET:
                LOG.info(record.line())

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        anthropic = scope["path"].startswith("/v1/messages")
        body = json.dumps(refusal.anthropic() if anthropic else refusal.openai()).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": refusal.status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        access, path = self._server.access, scope["path"]
        if access.hosts is not None and host_name(headers.get("host", "")) not in access.hosts:
            return Refusal(
                403,
                "the Host header names another machine; --allowed-host NAME lets it in",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if (
            access.hosts is not None
            and origin
            and host_name(_authority(origin)) not in access.hosts
        ):
            return Refusal(
                403,
                "the Origin header names another site; --allowed-host NAME lets it in",
                code="origin_not_allowed",
            )
        salt = access.salt_of(key_of(headers))
        scope["dsv4.salt"] = salt or b""
        open_here = path in OPEN or path == PAGE or (access.open_metrics and path == "/metrics")
        if salt is None and not open_here:
            return Refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        return None


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key of either kind of client; None without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _authority(origin: str) -> str:
    """Host and port of an Origin header; of "null", itself."""
    return origin.partition("://")[2] or origin


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
