"""Uploads a store to a hub: proved first, in commits, the marker with the last one.

    open      the login, the name, whether another store is there
    prove     every byte of the store against its manifest; nothing damaged is published
    compare   what the repository has already, by SHA-256 or git's name of a file
    commit    a few gigabytes at a time, each on top of the one before
    finish    the card, the root's zarr.json, the marker; then the repository is listed again

Until the marker is there, nobody takes the repository for a store. What is interrupted goes on
after the last commit, and the hub keeps files that were uploaded and not committed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # lazy

from dsv4.convert.sources.http import Patience
from dsv4.convert.sources.hub_repo import HubFile
from dsv4.formats.errors import ConflictError, StoreError
from dsv4.formats.plain_text import counted, first, printable
from dsv4.formats.store.damage import repaired_by
from dsv4.formats.store.integrity import check_root, node_faults
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import MARKER, NODE_DOCUMENT
from dsv4.formats.store.zarr_json import MAX_DOCUMENT_BYTES, parse_root
from dsv4.sharing.card import MAX_CARD_BYTES, is_ours, write_card
from dsv4.sharing.published import CARD
from dsv4.sharing.repository import Repository
from dsv4.sharing.transfer import Moved
from dsv4.validate.damage_scan import survey
from dsv4.validate.watch import Step

COMMIT_BYTES = 4 << 30
COMMIT_FILES = 200
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push did. nbytes: of all files; uploaded: of those that were not there already.

    branch: the one that was named; None: the main one.
    card: "written", "as it was", or "kept", one that somebody else wrote.
    """

    repo: str
    branch: str | None
    commit: str
    root: str
    files: int
    nbytes: int
    uploaded: int
    card: str

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "repo": self.repo,
            "revision": self.branch,
            "commit": self.commit,
            "root": self.root,
            "files": self.files,
            "bytes": self.nbytes,
            "uploaded_bytes": self.uploaded,
            "card": self.card,
        }


class Push:
    """One push, in the order of its methods: what can be refused early is refused early.

    repo: the hub id. revision: a branch. create: make the repository, `private` or not, if there is
    none. replace: also if it holds another store. replace_card: also if somebody else wrote its
    card. notice: gets sentences worth showing. on_wait: told, in a sentence, when the network is
    waited for.
    """

    def __init__(
        self,
        directory: str | Path,
        repo: str,
        *,
        revision: str | None = None,
        create: bool = False,
        private: bool = False,
        replace: bool = False,
        replace_card: bool = False,
        notice: Callable[[str], object] = lambda sentence: None,
        on_wait: Callable[[str], None] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Sends nothing. Raises StoreError for a store that is unfinished or lacks something,
        ConflictError when the repository holds another store, SourceError when the hub refuses,
        NetworkError when it does not answer.
        """
        disable_progress_bars()
        self._store = PackedStore.open(directory)
        if (absent := self._store.absent) is not None:
            raise StoreError(f"{absent.sentence(self._store.root)}; only a whole store is pushed")
        check_root(self._store)
        self._replace_card, self._private = replace_card, private
        self._hub = Repository(repo, revision, patience=patience, on_wait=on_wait)
        self._hub.open(create=create)
        for sentence in self._hub.notices:
            notice(sentence)
        if others := self._hub.strangers:
            notice(
                f"{self._hub} also holds {counted(len(others), 'file')} that no store has "
                f"({printable(first(others), 200)}), which stay there; choose another repository "
                "if that is not meant"
            )
        self._notice = notice
        self._other = _other_store(self._store, self._hub)
        if self._other is not None and not replace:
            raise ConflictError(
                f"{self._hub}: it holds the store with root {_root(self._other)}, {directory} has "
                f"root {_root(self._store)}; choose another repository or --revision, or give "
                "--replace"
            )

    def prove(self, progress: Callable[[Step], None] | None = None) -> None:
        """Read every byte of the store. Raises StoreError for the first that is damaged."""
        damaged = [f"{found.file.key}: {found.problem}" for found in survey(self._store, progress)]
        damaged += [str(fault) for fault in node_faults(self._store)]
        if damaged:
            root = self._store.root
            raise StoreError(
                f"{root}: {counted(len(damaged), 'file')} damaged, first {damaged[0]}; nothing was "
                f"pushed: {repaired_by(root)}"
            )

    def upload(self, progress: Callable[[Moved], None] | None = None) -> Pushed:
        """Send what is not there. progress: told of every file that is there.

        Raises ConflictError when somebody else commits meanwhile, SourceError, NetworkError.
        """
        hub = self._hub
        hub.create(private=self._private)
        ours = _sizes(self._store)
        card, verdict = self._card()
        upload = _Upload(self._store, hub, ours, progress)
        stale = []
        if self._other is not None:
            stale = [key for key in _keys(self._other) if key in hub.files and key not in ours]
            if MARKER in hub.files:  # from now on it is not the other store any more
                hub.commit([CommitOperationDelete(MARKER)], "Begin to replace the store")
        upload.run()
        upload.finish(card, stale)
        hub.refuse_absent(ours if card is None else {**ours, CARD: len(card)})
        total = sum(ours.values())
        root = _root(self._store)
        return Pushed(
            hub.repo, hub.branch, hub.head, root, len(ours), total, upload.uploaded, verdict
        )

    def _card(self) -> tuple[bytes | None, str]:
        """-> (the card to write, or None, and what becomes of it)."""
        card = write_card(self._store, self._hub.repo, self._hub.branch)
        if CARD not in self._hub.files:
            return card, "written"
        there = self._hub.read_small(CARD, MAX_CARD_BYTES)
        if there == card:
            return None, "as it was"
        if self._replace_card or is_ours(there):
            return card, "written"
        self._notice(
            f"{self._hub} has a {CARD} of somebody's own, which is kept; --replace-card writes "
            "dsv4's over it"
        )
        return None, "kept"


def _other_store(store: PackedStore, hub: Repository) -> PackedStore | None:
    """The store that the repository holds, if it is another one than `store`."""
    if NODE_DOCUMENT not in hub.files:
        return None
    raw = hub.read_small(NODE_DOCUMENT, MAX_DOCUMENT_BYTES)
    if raw == (store.root / NODE_DOCUMENT).read_bytes():
        return None
    try:
        return PackedStore(Path(str(hub)), parse_root(raw), verify=False)
    except StoreError:
        raise ConflictError(
            f"{hub}: it holds a {NODE_DOCUMENT} that is not a store's; choose another repository"
        ) from None


def _root(store: PackedStore) -> str:
    return f"{store.manifest.get('root')!s:.64}"


class _Upload:
    """Sends what is not there. sizes: of every file, by key; uploaded: bytes of those sent."""

    def __init__(
        self,
        store: PackedStore,
        hub: Repository,
        sizes: Mapping[str, int],
        progress: Callable[[Moved], None] | None,
    ) -> None:
        self._store = store
        self._hub = hub
        self._progress = progress
        self._sizes, self._total = sizes, sum(sizes.values())
        self._done = self._resumed = self.uploaded = 0

    def run(self) -> None:
        """Everything but what `finish` sends."""
        keys = [key for key in self._sizes if key not in (NODE_DOCUMENT, MARKER)]
        for number, batch in enumerate(self._batches(keys), 1):
            self._send(batch, f"Files of the store, part {number}")

    def finish(self, card: bytes | None, stale: Sequence[str]) -> None:
        """The card, the root's metadata and the marker, and away with what is stale."""
        last = [key for key in (NODE_DOCUMENT, MARKER) if not self._is_there(key)]
        more: list[Any] = [CommitOperationDelete(key) for key in stale]
        if card is not None:
            more.append(CommitOperationAdd(CARD, card))
        if last or more:
            self._send(last, f"Store with root {self._store.manifest['root']}", more)

    def _batches(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Keys that are not there, for a commit each."""
        batch: list[str] = []
        nbytes = 0
        for key in keys:
            if self._is_there(key):
                continue
            if batch and (len(batch) >= COMMIT_FILES or nbytes + self._sizes[key] > COMMIT_BYTES):
                yield batch
                batch, nbytes = [], 0
            batch.append(key)
            nbytes += self._sizes[key]
        if batch:
            yield batch

    def _is_there(self, key: str) -> bool:
        there = self._hub.files.get(key)
        if there is None or not is_same(self._store.root / key, there):
            return False
        self._resumed += self._sizes[key]
        self._count(key, self._sizes[key])
        return True

    def _send(self, keys: Sequence[str], message: str, more: Sequence[Any] = ()) -> None:
        added = [CommitOperationAdd(key, str(self._store.root / key)) for key in keys]
        self._hub.commit([*added, *more], message)
        for key in keys:
            self.uploaded += self._sizes[key]
            self._count(key, self._sizes[key])

    def _count(self, key: str, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(Moved(key, self._done, self._total, self._resumed))


def is_same(path: Path, there: HubFile) -> bool:
    """Whether the file at `path` is what the repository has, by the hash that it gives."""
    nbytes = path.stat().st_size
    if there.size != nbytes or (there.sha256 is None and there.blob_id is None):
        return False
    if there.sha256 is not None:
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            found.update(piece)
    return found.hexdigest() == (there.sha256 or there.blob_id)


def _keys(store: PackedStore) -> list[str]:
    """Every file of a store but its marker."""
    nodes = (*store.hierarchy.groups, *store.hierarchy.arrays)
    return [*store.records, *(f"{path}/{NODE_DOCUMENT}" for path in nodes), NODE_DOCUMENT]


def _sizes(store: PackedStore) -> Mapping[str, int]:
    """Bytes of every file of the store, marker included."""
    return {key: (store.root / key).stat().st_size for key in (*_keys(store), MARKER)}
