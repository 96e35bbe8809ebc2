"""The routes of a server, and what becomes of everything that is raised behind them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv4.serve.chat import Chat
from dsv4.serve.completions import complete
from dsv4.serve.exchange import converse, count_tokens
from dsv4.serve.face import Face
from dsv4.serve.gate import Gate
from dsv4.serve.messages import Messages
from dsv4.serve.metrics import CONTENT_TYPE
from dsv4.serve.openapi import description
from dsv4.serve.page import page
from dsv4.serve.record import LOG, Record
from dsv4.serve.refusal import Refusal, refusal_of
from dsv4.serve.responses import Responses
from dsv4.serve.server import Server, Stage

FACES: dict[str, Face] = {
    "/v1/chat/completions": Chat(),
    "/v1/responses": Responses(),
    "/v1/messages": Messages(),
}


class _Post:
    """A POST route: an ASGI app, since its answers may outlive a call."""

    def __init__(
        self,
        answer: Callable[..., Awaitable[ASGIApp]],
        body_of: Callable[[Refusal], dict[str, Any]],
    ) -> None:
        self._answer, self._body_of = answer, body_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens."""
        record: Record = scope["dsv4.record"]
        try:
            response = await self._answer(Request(scope, receive), record=record)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                LOG.error("request %s failed", record.id, exc_info=error)
                refusal = Refusal(500, f"the server failed; its log has request {record.id}")
            record.error = refusal.for_the_log
            response = JSONResponse(
                self._body_of(refusal), status_code=refusal.status, headers=refusal.headers
            )
        await response(scope, receive, send)


def make_app(server: Server) -> Starlette:
    """The ASGI application of `server`."""
    routes = [
        Route("/health", _health, methods=["GET"]),
        Route("/ready", _ready, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
        Route("/v1", _probe, methods=["GET"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{name:path}", _one_model, methods=["GET"]),
        Route("/", _page if server.page else _probe, methods=["GET"]),
    ]
    for path, face in FACES.items():
        routes.append(Route(path, _converse(server, face), methods=["POST"]))
    completing = _Post(partial(complete, server=server), Refusal.openai)
    counting = _Post(partial(count_tokens, server=server), Refusal.anthropic)
    routes.append(Route("/v1/completions", completing, methods=["POST"]))
    routes.append(Route("/v1/messages/count_tokens", counting, methods=["POST"]))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, server=server)],
        exception_handlers={404: _not_found, 405: _wrong_method},
    )
    app.state.server = server
    return app


def _converse(server: Server, face: Face) -> _Post:
    return _Post(partial(converse, server=server, face=face), face.refusal_body)


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


async def _health(request: Request) -> Response:
    failure = _server(request).failure
    if failure is not None:
        return JSONResponse({"status": "failed", "error": failure}, status_code=503)
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    server = _server(request)
    ready = server.stage is Stage.READY and server.failure is None
    headers = {} if ready else {"retry-after": "2"}
    return JSONResponse(server.state(), status_code=200 if ready else 503, headers=headers)


async def _metrics(request: Request) -> Response:
    return Response(_server(request).metrics.page(), headers={"content-type": CONTENT_TYPE})


async def _openapi(request: Request) -> Response:
    model = _server(request).model
    return JSONResponse(description(model.names[0], model.vocab))


async def _probe(request: Request) -> Response:
    return PlainTextResponse(f"dsv4 serves {_server(request).model.names[0]}\n")


async def _page(request: Request) -> Response:
    return page()


async def _models(request: Request) -> Response:
    server = _server(request)
    data = [_model(server, name) for name in server.model.names]
    # Anthropic's client reads has_more and the ids of a page, OpenAI's reads object.
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "has_more": False,
            "first_id": data[0]["id"],
            "last_id": data[-1]["id"],
        }
    )


async def _one_model(request: Request) -> Response:
    server, name = _server(request), request.path_params["name"]
    try:
        server.model.check_name(name)
    except Refusal as refusal:
        return JSONResponse(refusal.openai(), status_code=refusal.status)
    return JSONResponse(_model(server, name))


def _model(server: Server, name: str) -> dict[str, Any]:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(server.created))
    room = server.room
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": server.created,
        "created_at": made,
        "display_name": name,
        "owned_by": "dsv4",
        "max_model_len": room,
        "context_length": room,
    }


async def _not_found(request: Request, error: Exception) -> Response:
    refusal = Refusal(404, f"there is no route {request.method} {request.url.path}")
    return _shaped(request, refusal)


async def _wrong_method(request: Request, error: Exception) -> Response:
    refusal = Refusal(405, f"{request.url.path} does not take {request.method}")
    return _shaped(request, refusal, getattr(error, "headers", None))


def _shaped(request: Request, refusal: Refusal, headers: dict[str, str] | None = None) -> Response:
    anthropic = request.url.path.startswith("/v1/messages")
    body = refusal.anthropic() if anthropic else refusal.openai()
    return JSONResponse(body, status_code=refusal.status, headers=headers)
