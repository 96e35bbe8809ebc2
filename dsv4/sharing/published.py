"""A store in a hub repository: its metadata read and proved, its files handed out range by range.

Only names that the manifest lists are asked for, and they are the manifest's, checked when it is
read; what else a repository holds is not looked at. Nodes' own `zarr.json` are made, not fetched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import is_offline_mode

from dsv4.convert.sources.base import CONFIG_FILE, ByteStream
from dsv4.convert.sources.http import Patience, Waits
from dsv4.convert.sources.hub_repo import HubRepo
from dsv4.formats.errors import SourceError, StoreError
from dsv4.formats.plain_text import counted, first
from dsv4.formats.store.integrity import check_root
from dsv4.formats.store.parts import PARTS, Absent, is_draft
from dsv4.formats.store.reader import MAX_MARKER_BYTES, PackedStore
from dsv4.formats.store.specs import ASSET_DIRECTORY, MARKER, NODE_DOCUMENT
from dsv4.formats.store.zarr_json import MAX_DOCUMENT_BYTES

LEAST_DIGITS = 16
MOST_FILES = 1 << 18
CARD = "README.md"
_DIGITS = re.compile(r"[0-9a-f]{16,64}")
_NAME = re.compile(
    rf"""
    (?:[A-Za-z0-9_]{{1,64}}/){{0,20}}(?:[A-Za-z0-9_]{{1,64}}|{re.escape(NODE_DOCUMENT)})
    | {ASSET_DIRECTORY}/[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}
    | {re.escape(MARKER)} | {re.escape(CONFIG_FILE)} | {re.escape(CARD)}
    """,
    re.VERBOSE,
)


class PublishedStore:
    """The store in a repository at one commit; only its metadata is read.

    repo, commit: as the hub says them now. store: as the metadata describes it, under a root
    recomputed from that metadata. marker, document: the two files that it was read from.
    notices: sentences worth showing.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        patience: Patience | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        """Raises SourceError for what is not a whole store, NetworkError, StoreError for a store
        whose metadata is malformed or does not have the root that it claims.
        """
        if is_offline_mode():
            raise SourceError(f"{repo} cannot be pulled: HF_HUB_OFFLINE is set; unset it")
        self._waits = Waits(repo, on_wait or (lambda sentence: None))
        self._hub = HubRepo(
            repo,
            revision,
            endpoint=None,
            token=None,
            cache=None,
            patience=self._waits.patience(patience),
            wanted=lambda name: is_of_a_store(name) and not name.endswith(f"/{NODE_DOCUMENT}"),
            most=MOST_FILES,
        )
        self.repo, self.commit, self.notices = self._hub.repo, self._hub.commit, self._hub.notices
        self._refuse_no_store()
        self.marker = self._hub.read_small(MARKER, MAX_MARKER_BYTES)
        self.document = self._hub.read_small(NODE_DOCUMENT, MAX_DOCUMENT_BYTES)
        try:
            self.store = PackedStore.interpret(Path(str(self)), self.marker, self.document)
        except StoreError as error:
            raise StoreError(f"{self}: {error}") from None
        self.root = check_root(self.store)

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    def without(self, parts: Collection[str]) -> PackedStore:
        """The store as it is without `parts`, of `PARTS`; those that it does not have are nothing.

        Raises SourceError for what cannot be left out.
        """
        if unknown := sorted(set(parts) - PARTS.keys()):
            raise SourceError(f"{unknown[0]!r:.80} cannot be left out, expected {', '.join(PARTS)}")
        if not any(is_draft(key) for key in self.store.records) or not parts:
            return self.store
        absent = Absent(tuple(sorted(set(parts))), self.repo, self.commit)
        return PackedStore(self.store.root, self.store.whole, verify=False, absent=absent)

    def refuse_other_root(self, pinned: str) -> None:
        """Raise SourceError unless the root begins with `pinned`, which `check_pin` has seen."""
        if not self.root.startswith(pinned.lower()):
            raise SourceError(
                f"{self} holds the store with root {self.root}, --root says {pinned}; nothing was "
                "fetched: check the name and --revision, or ask whoever gave you the root"
            )

    def refuse_missing_files(self) -> None:
        """Raise SourceError unless the repository lists every file of the store by its size."""
        records, listed = self.store.records, self._hub.files
        if missing := [key for key in records if key not in listed]:
            raise SourceError(
                f"{self} lacks {counted(len(missing), 'file')} of the store's {len(records):,} "
                f"({first(missing)}); choose another revision, or tell its owner to push it again"
            )
        for key, record in records.items():
            if listed[key].size != record.nbytes:
                raise SourceError(
                    f"{self}: {key} has {listed[key].size} bytes, the manifest says "
                    f"{record.nbytes}; choose another revision, or tell its owner to push it again"
                )

    def read_into(self, key: str, position: int, view: memoryview) -> None:
        """Fill `view` with bytes of a file from `position` on. Raises SourceError."""
        self._hub.read_into(key, position, view, "a chunk")

    def stream(
        self, key: str, begin: int, end: int
    ) -> contextlib.AbstractContextManager[ByteStream]:
        """Bytes `[begin, end)` of a file in order. Raises SourceError."""
        return self._hub.stream(key, begin, end)

    def give_up(self) -> None:
        """Whoever waits for the network fails."""
        self._waits.give_up()

    def _refuse_no_store(self) -> None:
        if MARKER in self._hub.files and NODE_DOCUMENT in self._hub.files:
            return
        if NODE_DOCUMENT in self._hub.files:
            raise SourceError(
                f"{self} holds a store that is not whole ({MARKER} is missing): its push is not "
                "finished; try again later, or tell its owner"
            )
        if CONFIG_FILE in self._hub.files:
            raise SourceError(
                f"{self} is a checkpoint that is not packed; pack it yourself: "
                f"dsv4 convert --hf {self.repo} --out DIR"
            )
        raise SourceError(f"{self} is not a packed store: it has no {MARKER}; check the name")


def check_pin(pinned: str) -> None:
    """Raise SourceError unless `pinned` is a root, or enough of its first digits.

    The first 16 tell any two stores apart. A forger finds another one with the same after some
    2^64 tries: give all 64 where that counts.
    """
    if not _DIGITS.fullmatch(pinned.lower()):
        raise SourceError(
            f"--root {pinned:.80} is not a root: give all of its 64 hex digits, or at least the "
            f"first {LEAST_DIGITS}"
        )


def is_of_a_store(name: str) -> bool:
    """Whether a file of this name may be a store's, or stands beside one and is looked at."""
    return _NAME.fullmatch(name) is not None
