"""What a hub's answers mean: fine, try again, or no; and how patiently to try again."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # lazy

from dsv4.formats.errors import SourceError

T = TypeVar("T")

PASSING = frozenset({429, 500, 502, 503, 504})
_MAX_REASON = 160
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class BrokenError(Exception):
    """A failure that may pass. retry_after: seconds the server asked to wait, if it did."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(" ".join(reason.split())[:_MAX_REASON])
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for an answer, and how often to ask again. All times are seconds.

    attempts: failures in a row, without a new byte between them, until it is given up.
    first_wait doubles with each failure up to longest_wait; a server may ask for more than that,
    up to longest_asked. connect, read: of one connection attempt, and between two arrivals.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_asked: float = 300.0
    connect: float = 10.0
    read: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    @property
    def timeout(self) -> httpx2.Timeout:
        """For one request."""
        return httpx2.Timeout(self.read, connect=self.connect)

    def persist(self, subject: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, repeated while it raises BrokenError.

        Raises SourceError, naming `subject`, when too many attempts in a row fail.
        """
        for failures in itertools.count(1):
            try:
                return attempt()
            except BrokenError as error:
                if failures >= self.attempts:
                    raise SourceError(
                        f"{subject} cannot be read: {error} ({failures} failures in a row); check "
                        "the network and run the command again"
                    ) from None
                self.sleep(self._wait(failures, error.retry_after))
        raise AssertionError("the loop has no end")

    def _wait(self, failures: int, asked: float | None) -> float:
        wait = min(self.first_wait * 2.0 ** (failures - 1), self.longest_wait)
        wait *= random.uniform(0.5, 1.0)  # so that many readers do not come back at once
        return max(wait, min(asked or 0.0, self.longest_asked))


def broken(error: httpx2.RequestError) -> BrokenError:
    """A failure below HTTP: no connection, no answer in time, a cut."""
    return BrokenError(f"{type(error).__name__} {error}")


def check_status(response: httpx2.Response, repo: str, subject: str) -> None:
    """Return when the answer is a success (2xx).

    Raises BrokenError when it may be another time, else SourceError that says what to do.
    repo: the hub id. subject: what was asked for, named first.
    """
    status = response.status_code
    if 200 <= status < 300:
        return
    if status in PASSING:
        raise BrokenError(f"the answer was {status}", _retry_after(response))
    raise SourceError(f"{subject} {_refusal(status, response.headers, repo)}")


def _refusal(status: int, headers: httpx2.Headers, repo: str) -> str:
    code = headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        return f"is gated; accept the licence on the page of {repo}, then {_LOG_IN}"
    if status == 401:
        return (
            f"cannot be seen without a login; check the name {repo}, and {_LOG_IN} if the "
            "repository is private or gated"
        )
    if status == 403:
        return f"is forbidden; check that your token may read {repo}, or {_LOG_IN}"
    if code == "RevisionNotFound":
        return f"is no revision of {repo}; check --revision"
    if code == "EntryNotFound":
        return f"is not in {repo}, though it is listed; run the command again"
    if status == 404:
        return f"is not found; check the name {repo}, and {_LOG_IN} if the repository is private"
    return f"cannot be read: the answer was {status}; check HF_ENDPOINT, or try again later"


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds to wait, by the Retry-After header or the hub's own; dates are not understood."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    return None
