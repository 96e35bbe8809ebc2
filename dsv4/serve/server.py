"""What all routes of one server share, and the stages that it goes through."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import time
import weakref

from dsv4.serve.jobs import Engine
from dsv4.serve.metrics import Metrics
from dsv4.serve.model import ServedModel
from dsv4.serve.refusal import Refusal
from dsv4.serve.replay import Memory
from dsv4.serve.runs import Runs

MIB = 1 << 20


class Stage(enum.Enum):
    """Of a server's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclasses.dataclass(frozen=True)
class Limits:
    """body: bytes of a request. seconds: of a request, None for any. tokens: most of an answer."""

    body: int = 16 * MIB
    seconds: float | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask. keys: none lets everybody. hosts: names in the Host header of a server without
    keys, None for any: a page elsewhere cannot ask by a name of its own.
    """

    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    open_metrics: bool = False

    def salt_of(self, given: str | None) -> bytes | None:
        """Of the caller with this key: what others cannot find out about. None for a wrong key."""
        if not self.keys:
            return b""
        digest = _digest(given or "")
        found = [key for key in self.keys if hmac.compare_digest(digest, _digest(key))]
        if not found:
            return None
        return digest[:16] if len(self.keys) > 1 else b""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


class Server:
    """The state of one server. phase: what was done last while it loads."""

    def __init__(
        self,
        model: ServedModel,
        *,
        limits: Limits | None = None,
        access: Access | None = None,
        page: bool = True,
    ) -> None:
        self.model, self.page = model, page
        self.limits, self.access = limits or Limits(), access or Access()
        self.metrics = Metrics(model.names[0], model.max_positions)
        self.memory = Memory()
        self.stage = Stage.LOADING
        self.phase = "starting"
        self.begun = time.monotonic()
        self.created = int(time.time())
        self.runs: weakref.WeakSet[Runs] = weakref.WeakSet()
        self.active = 0  # requests that are not answered yet
        self._engine: Engine | None = None

    def ready(self, engine: Engine) -> None:
        """From now on requests are answered."""
        self._engine = engine
        self.metrics.watch(engine.stats)
        if self.stage is Stage.LOADING:
            self.stage = Stage.READY

    def drain(self) -> None:
        """From now on no request is taken."""
        self.stage = Stage.DRAINING

    @property
    def engine(self) -> Engine:
        """Raises Refusal 503 when there is none to ask."""
        if self.stage is Stage.DRAINING:
            raise Refusal(503, "the server is ending", code="server_ending", retry_after=10)
        if self._engine is None:
            raise Refusal(
                503, f"the model is loading: {self.phase}", code="model_loading", retry_after=5
            )
        if (failure := self.failure) is not None:
            raise Refusal(503, f"the engine has failed: {failure}", code="engine_failed")
        return self._engine

    @property
    def failure(self) -> str | None:
        """Why the engine runs nothing any more; None while it does."""
        return None if self._engine is None else self._engine.failure

    @property
    def room(self) -> int:
        """Most tokens of a sequence."""
        return self.model.max_positions if self._engine is None else self._engine.max_seq_len

    def state(self) -> dict[str, object]:
        """What `/ready` tells."""
        told: dict[str, object] = {"status": self.stage.value, "model": self.model.names[0]}
        if self.stage is Stage.LOADING:
            told |= {"phase": self.phase, "seconds": round(time.monotonic() - self.begun, 1)}
        if self.failure is not None:
            told |= {"status": "failed", "error": self.failure}
        return told
