"""What a hub's answers mean: fine, try again, or no; and how patiently to try again."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # lazy

from dsv4.convert.sources.hub_login import Login
from dsv4.formats.errors import NetworkError, SourceError

T = TypeVar("T")

PASSING = frozenset({408, 429})  # and what is the server's own fault: 500 and above
_MAX_REASON = 300


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
    on_wait: told a sentence and the seconds before each wait.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_asked: float = 300.0
    connect: float = 10.0
    read: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    on_wait: Callable[[str, float], None] = lambda sentence, seconds: None

    @property
    def timeout(self) -> httpx2.Timeout:
        """For one request."""
        return httpx2.Timeout(self.read, connect=self.connect)

    def persist(self, subject: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, repeated while it raises BrokenError.

        Raises NetworkError, naming `subject`, when too many attempts in a row fail.
        """
        for failures in itertools.count(1):
            try:
                return attempt()
            except BrokenError as error:
                if failures >= self.attempts:
                    raise NetworkError(
                        f"{subject} cannot be read: {error} ({failures} failures in a row); check "
                        "the network and run the command again"
                    ) from None
                seconds = self._wait(failures, error.retry_after)
                self.on_wait(
                    f"{subject}: {error}; try {failures + 1} of {self.attempts} in "
                    f"{max(seconds, 1):.0f} s",
                    seconds,
                )
                self.sleep(seconds)
        raise AssertionError("the loop has no end")

    def _wait(self, failures: int, asked: float | None) -> float:
        wait = min(self.first_wait * 2.0 ** (failures - 1), self.longest_wait)
        wait *= random.uniform(0.5, 1.0)  # so that many readers do not come back at once
        return max(wait, min(asked or 0.0, self.longest_asked))


class Waits:
    """The waits of many threads for one repository: told of one at a time, given up together.

    tell: told, in a sentence, what is waited for before it is tried again.
    """

    def __init__(self, repo: str, tell: Callable[[str], None]) -> None:
        self._repo = repo
        self._tell = tell
        self._gave_up = threading.Event()
        self._saying, self._quiet_until = threading.Lock(), 0.0

    def patience(self, patience: Patience | None = None) -> Patience:
        """`patience`, or the default one that `give_up` ends, with waits that are told."""
        return dataclasses.replace(patience or Patience(sleep=self._pause), on_wait=self._say)

    def give_up(self) -> None:
        """Whoever waits fails."""
        self._gave_up.set()

    def _pause(self, seconds: float) -> None:
        if self._gave_up.wait(seconds):
            raise SourceError(f"{self._repo} is no longer read; run the same command again")

    def _say(self, sentence: str, seconds: float) -> None:
        """Tell of a wait, unless another thread's, that was told of, is not over yet."""
        with self._saying:
            now = time.monotonic()
            if now >= self._quiet_until:
                self._quiet_until = now + seconds
                self._tell(sentence)


def check_status(
    response: httpx2.Response, repo: str, subject: str, login: Login, *, elsewhere: bool = False
) -> None:
    """Return when the answer is a success (2xx).

    Raises BrokenError when it may be another time, else SourceError that says what to do.
    repo: the hub id. subject: what was asked for, named first. elsewhere: the answer is not the
    hub's, but that of a host to which it redirects, and which gets no token.
    """
    status, host = response.status_code, response.request.url.netloc.decode()
    if 200 <= status < 300:
        return
    if status in PASSING or status >= 500:
        raise BrokenError(f"the answer of {host} was {status}", _retry_after(response))
    if elsewhere:
        raise SourceError(
            f"{subject} is refused by {host}, to which the hub redirects: the answer was {status}; "
            "run the command again, and try another network if that does not help"
        )
    sent = login.has_token and "Authorization" in response.request.headers
    refusal = _refusal_of_token if sent and status in (401, 403) else _refusal
    raise SourceError(f"{subject} {refusal(response, repo, login)}")


def _refusal_of_token(response: httpx2.Response, repo: str, login: Login) -> str:
    words = login.words_of(response)
    because = f": {words}" if words else ""
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return (
            f"is gated{because}; accept the licence on the page of {repo} with the account behind "
            f"{login.name}, and let that token read gated repositories"
        )
    if response.status_code == 401:
        return f"cannot be read: {login.name} is not accepted{because}; {login.renew}"
    return f"is forbidden to {login.name}{because}; check that it may read {repo}"


def _refusal(response: httpx2.Response, repo: str, login: Login) -> str:
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    words = login.words_of(response)
    because = f" ({words})" if words else ""
    if code == "GatedRepo":
        return f"is gated; accept the licence on the page of {repo}, then {login.advice}"
    if status == 401:
        return (
            f"cannot be seen without a login; check the name {repo}, and {login.advice} if the "
            "repository is private or gated"
        )
    if status == 403:
        return f"is forbidden{because}; {login.advice} if {repo} is for some accounts only"
    if code == "RevisionNotFound":
        return f"is not a revision of {repo}; check --revision"
    if code == "EntryNotFound":
        return f"is not in {repo}, though it is listed; run the command again"
    if status == 404:
        who = f"check that {login.name} may see it" if login.has_token else login.advice
        return f"is not found; check the name {repo}, and {who} if the repository is private"
    return (
        f"cannot be read: the answer was {status}{because}; check HF_ENDPOINT, or try again later"
    )


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds to wait, by the Retry-After header or the hub's own; dates are not understood."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    return None
