"""What is known of a request when it ends: one line of JSON in the log, without what was said."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.serve.metrics import Meter

LOG = logging.getLogger("dsv4.serve")


@dataclasses.dataclass
class Record:
    """One request. Seconds are milliseconds in the line; what is not known is left out."""

    id: str
    route: str
    client: str
    trace: str | None = None
    model: str | None = None
    status: int = 0
    finish: str | None = None
    cancelled: bool = False
    error: str | None = None
    prompt_tokens: int = 0
    meters: list[Meter] = dataclasses.field(default_factory=list)
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def line(self) -> str:
        """The line."""
        firsts = [meter.first for meter in self.meters if meter.first is not None]
        queued = [meter.queued for meter in self.meters if meter.queued is not None]
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self.id,
            "route": self.route,
            "client": self.client,
            "trace": self.trace,
            "model": self.model,
            "status": self.status,
            "prompt_tokens": self.prompt_tokens or None,
            "cached_tokens": sum(meter.cached for meter in self.meters) or None,
            "generated_tokens": sum(meter.generated for meter in self.meters) or None,
            "queue_ms": _milliseconds(min(queued)) if queued else None,
            "first_token_ms": _milliseconds(min(firsts)) if firsts else None,
            "total_ms": _milliseconds(time.monotonic() - self.begun),
            "finish": self.finish,
            "cancelled": self.cancelled or None,
            "error": self.error,
        }
        return json.dumps({key: value for key, value in fields.items() if value is not None})


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)
