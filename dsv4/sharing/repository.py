"""A hub repository that is written to: huggingface_hub's client, its failures in our sentences."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError

from dsv4.convert.sources.base import CONFIG_FILE
from dsv4.convert.sources.http import PASSING, Patience, Waits
from dsv4.convert.sources.hub_client import lost
from dsv4.convert.sources.hub_login import make_login
from dsv4.convert.sources.hub_repo import HubFile, HubRepo
from dsv4.formats.errors import ConflictError, NetworkError, SourceError
from dsv4.formats.plain_text import counted, first, printable
from dsv4.formats.version import VERSION
from dsv4.sharing.published import MOST_FILES, is_of_a_store

T = TypeVar("T")

THREADS = 5
LOOK_SECONDS = 0.2
_REFUSED = (401, 403)
_MOVED_ON = (409, 412)


class Repository:
    """One branch of a repository. files: at `head`, its newest commit; empty without one.

    strangers: names of other files there, which are none of a store's or of git's.
    """

    files: Mapping[str, HubFile] = MappingProxyType({})
    strangers: Sequence[str] = ()
    notices: tuple[str, ...] = ()
    head = ""

    def __init__(
        self,
        repo: str,
        branch: str | None,
        *,
        patience: Patience | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Raises SourceError without a login, or when the hub is not to be asked."""
        if is_offline_mode():
            raise SourceError(f"{repo} cannot be pushed to: HF_HUB_OFFLINE is set; unset it")
        self.repo = repo
        self.branch = branch
        self._login = make_login(None)
        if not self._login.has_token:
            raise SourceError(f"a push to {repo} needs a login; {self._login.advice}")
        self._api = HfApi(library_name="dsv4", library_version=VERSION)
        self._patience = Waits(repo, on_wait or (lambda sentence: None)).patience(patience)

    def __str__(self) -> str:
        return self.repo if self.branch is None else f"{self.repo}@{printable(self.branch, 100)}"

    def open(self, *, create: bool) -> None:
        """List it. Without it or its branch there is nothing to list, if it is to be made.

        Raises SourceError, NetworkError.
        """
        there = self._ask(lambda: self._api.repo_exists(self.repo))
        if not there and not create:
            raise SourceError(
                f"{self.repo} is not there, or {self._login.name} may not see it; check the name, "
                "or make it with --create"
            )
        branch = self.branch
        if there and create and branch is not None:
            there = self._ask(lambda: self._api.revision_exists(self.repo, branch))
        if there:
            self._list()

    def create(self, *, private: bool) -> None:
        """Make the repository, and its branch, if `open` did not find them."""
        if self.head:
            return
        self._ask(lambda: self._api.create_repo(self.repo, private=private, exist_ok=True))
        if (branch := self.branch) is not None:
            self._ask(lambda: self._api.create_branch(self.repo, branch=branch, exist_ok=True))
        self._list()

    def read_small(self, name: str, limit: int) -> bytes:
        """All of a file as it was when the repository was listed. Raises SourceError."""
        return self._hub.read_small(name, limit)

    def commit(self, operations: Sequence[Any], message: str) -> None:
        """One commit on top of `head`; files that the hub has are not sent again.

        Raises ConflictError when somebody else committed meanwhile, SourceError, NetworkError.
        """
        done = self._ask(
            lambda: self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                revision=self.branch,
                parent_commit=self.head,
                num_threads=THREADS,
            )
        )
        self.head = done.oid

    def refuse_absent(self, sizes: Mapping[str, int]) -> None:
        """List the repository again. Raises SourceError unless every file is there by its size,
        ConflictError when somebody else committed meanwhile.
        """
        pushed = self.head
        self._list()
        absent = [k for k, n in sizes.items() if k not in self.files or self.files[k].size != n]
        if absent and self.head != pushed:
            raise ConflictError(
                f"{self} took the push as commit {pushed[:12]}, and somebody else changed it to "
                f"{self.head[:12]} meanwhile ({first(absent)}); see what is there before you push "
                "again"
            )
        if absent:
            raise SourceError(
                f"{self} took the push, and does not list {counted(len(absent), 'file')} of it "
                f"({first(absent)}); see whether its .gitignore names them, then run the same "
                "command again"
            )

    def _list(self) -> None:
        names: list[str] = []

        def is_wanted(name: str) -> bool:
            names.append(name)
            return is_of_a_store(name)

        self._hub = HubRepo(
            self.repo,
            self.branch,
            endpoint=None,
            token=None,
            cache=None,
            patience=self._patience,
            wanted=is_wanted,
            most=MOST_FILES,
        )
        self.repo, self.notices = self._hub.repo, self._hub.notices
        self.files = self._hub.files
        self.head = self._hub.commit
        self.strangers = [
            name
            for name in names
            if name == CONFIG_FILE or not (is_of_a_store(name) or name.startswith(".git"))
        ]

    def _ask(self, question: Callable[[], T]) -> T:
        """The client's answer. Waits in a way that Ctrl-C ends at once: the client's would not."""
        answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, name="push", daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if isinstance(answer, Exception):
                raise self._sentence(answer) from None
            return answer

    def _sentence(self, error: Exception) -> Exception:
        """What to raise for a failure of the client, which may stand behind others."""
        last: BaseException = error
        while True:
            if isinstance(last, HfHubHTTPError):
                return self._refusal(last.response)
            if isinstance(last, httpx2.RequestError):
                return self._network(last)
            if (cause := last.__cause__ or last.__context__) is None:
                break
            last = cause
        why = printable(f"{type(last).__name__}: {last}", 300)
        return SourceError(
            f"{self} does not take the push ({why}); run the same command again to continue"
        )

    def _network(self, error: httpx2.RequestError) -> Exception:
        why = lost(error)
        if isinstance(why, SourceError):
            return why
        return NetworkError(
            f"{self} cannot be written to: {why}; check the network and run the same command again "
            "to continue"
        )

    def _refusal(self, response: httpx2.Response) -> Exception:
        status, login = response.status_code, self._login
        words = login.words_of(response)
        because = f": {words}" if words else ""
        if status in PASSING or status >= 500:
            return self._passing(response)
        if status == 401:
            return SourceError(
                f"{self} cannot be written to: {login.name} is not accepted{because}; {login.renew}"
            )
        if status == 403:
            return SourceError(
                f"{self} may not be written to with {login.name}{because}; give a token that may"
            )
        if status in _MOVED_ON:
            return ConflictError(
                f"{self} changed while it was pushed to{because}; see what is there, then run the "
                "same command again"
            )
        return SourceError(
            f"{self} does not take the push: the answer was {status}{because}; check the name and "
            "--revision, which is to be a branch"
        )

    def _passing(self, response: httpx2.Response) -> Exception:
        host = response.request.url.netloc.decode()
        return NetworkError(
            f"{self} cannot be written to: the answer of {host} was {response.status_code}; run "
            "the same command again to continue"
        )
