"""A server's life: a socket, then the weights, then answers, then an end in order.

The socket is bound before anything is loaded, so that `/ready` can tell how far it is. SIGTERM lets
what runs finish; a second one, or SIGINT, does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from dsv4.formats.errors import RuntimeRefusal
from dsv4.serve.app import make_app
from dsv4.serve.jobs import Engine
from dsv4.serve.server import Server

_BACKLOG = 1024


class _Listener(uvicorn.Server):
    """uvicorn's server, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `Host`'s."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RuntimeRefusal for an address that cannot be had."""
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            made = undo.enter_context(socket.socket(family, kind, protocol))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(_BACKLOG)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RuntimeRefusal(
                f"--host {host} --port {port} cannot be listened on: {reason}; "
                "another --port, or 0 for a free one, may do"
            ) from None
        undo.pop_all()
    return made


def address_of(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Host:
    """Runs `server` on a bound socket. load: makes the engine, on a thread. say: for the operator.

    grace: seconds that what runs may take after SIGTERM.
    """

    def __init__(
        self,
        server: Server,
        bound: socket.socket,
        load: Callable[[], Engine],
        say: Callable[[str], None],
        *,
        grace: float = 30.0,
    ) -> None:
        self._server, self._bound, self._load, self._say = server, bound, load, say
        self._grace = grace
        self._error: BaseException | None = None
        self._engine: Engine | None = None
        self._ending = False

    def run(self) -> None:
        """Serve until SIGTERM. Raises what loading raised, and KeyboardInterrupt for SIGINT."""
        sys.setswitchinterval(0.0005)  # the engine's thread is not to wait 5 ms for the parser
        asyncio.run(self._serve())
        if self._engine is not None:
            self._engine.close(finish=False)
        if self._error is not None:
            raise self._error

    async def _serve(self) -> None:
        config = uvicorn.Config(
            make_app(self._server),
            http="h11",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
        self._listener = _Listener(config)
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)
        threading.Thread(target=self._loading, name="loading", daemon=True).start()
        await self._listener.serve(sockets=[self._bound])

    def _loading(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._call(self._end, error)
            return
        self._call(self._loaded, engine)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _loaded(self, engine: Engine) -> None:
        self._engine = engine
        self._server.ready(engine)
        if not self._ending:
            self._say(f"listening on {address_of(self._bound)}")
        self._watching = self._loop.create_task(self._watch(engine))

    async def _watch(self, engine: Engine) -> None:
        """End when the engine cannot go on: what restarts the process finds out by its code."""
        while engine.failure is None:
            await asyncio.sleep(0.5)
        await asyncio.sleep(1)  # let `/health` and the answers that fail say so
        self._end(RuntimeRefusal(f"the engine has failed: {engine.failure}"))

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGINT:
            self._end(KeyboardInterrupt())
        elif self._ending:
            self._end(None)
        else:
            self._ending = True
            self._server.drain()
            running = self._server.active
            self._say(f"ending; {running} requests are finished first" if running else "ending")
            self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._server.active:
                    await asyncio.sleep(0.02)
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = self._error or error
        self._server.drain()
        for runs in list(self._server.runs):
            runs.give_up("the server is ending")
        self._listener.should_exit = True


def log_to_stderr() -> None:
    """Requests as lines of JSON, faults of the server with their tracebacks."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dsv4.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
