"""Fetches a published store: the manifest against the root, every chunk against the manifest.

    published   marker, metadata, root: proved before a byte of weights moves
    transfer    ranges of files on many threads; each chunk compared before it is written
    writer      the journal: what is on disk for good; a file is whole when its BLAKE3 is right
    finish      the nodes' documents are made, the root's written, the marker last

What is killed goes on at the last piece that the journal knows.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from dsv4.convert.sources.base import bytes_of
from dsv4.convert.sources.http import Patience
from dsv4.formats.errors import ConflictError, OtherConversionError, SourceError, StoreError
from dsv4.formats.store.damage import sizes
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.integrity import node_faults
from dsv4.formats.store.parts import PART_MARKER
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL, MARKER, NODE_DOCUMENT
from dsv4.formats.store.writer import StoreWriter
from dsv4.formats.store.zarr_metadata import metadata_documents
from dsv4.sharing.published import PublishedStore, check_pin
from dsv4.sharing.transfer import AGAIN, STREAMS, Moved, Transfer, cut, pieces
from dsv4.validate.damage_scan import FileDamage, examine
from dsv4.validate.made_from import WRONG_SOURCE
from dsv4.validate.repair import rewrite


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What a pull did. root: proved; pinned: whether it was compared with one given by the user.

    absent: parts that were left out. files, nbytes: that are there. fetched: of these bytes, what
    came over the network now. unread: whether a finished pull was there, whose files were looked at
    for their sizes alone.
    """

    out: Path
    repo: str
    commit: str
    root: str
    pinned: bool
    absent: tuple[str, ...]
    files: int
    nbytes: int
    fetched: int
    unread: bool

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "repo": self.repo,
            "commit": self.commit,
            "root": self.root,
            "root_pinned": self.pinned,
            "absent": list(self.absent),
            "files": self.files,
            "bytes": self.nbytes,
            "fetched_bytes": self.fetched,
            "unread": self.unread,
        }


def pull(
    repo: str,
    out: str | Path,
    *,
    revision: str | None = None,
    root: str | None = None,
    leave_out: Collection[str] = (),
    streams: int = STREAMS,
    progress: Callable[[Moved], None] | None = None,
    notice: Callable[[str], object] = lambda sentence: None,
    on_wait: Callable[[str], None] | None = None,
    patience: Patience | None = None,
) -> Pulled:
    """Fetch the store in the hub repository `repo` into the directory `out`, or go on with it.

    root: what the store's root is to be, or at least its first 16 digits. leave_out: of `PARTS`,
    what is not wanted; a later pull without it fetches the rest. streams: files read at once.
    progress: told of every piece. notice: gets sentences worth showing. on_wait: told, in a
    sentence, when the network is waited for.
    Nothing but metadata is fetched before the root is right, every file is listed, and there is
    room. Raises SourceError, NetworkError, StoreError, ConflictError when `out` holds something
    else, OutOfSpaceError.
    """
    if root is not None:
        check_pin(root)
    out = Path(out)
    published = PublishedStore(repo, revision, patience=patience, on_wait=on_wait)
    for sentence in published.notices:
        notice(sentence)
    if root is not None:
        _refuse_other_root(published, out, root)
    else:
        notice(f"the root is the one that {published} names; --root holds it to yours")
    wanted = published.without(leave_out)
    unread = _is_finished(out)
    if unread:
        notice(
            f"{out}: what is there already is not read; `dsv4 validate {shlex.quote(str(out))}` "
            "compares every byte, and a file that it names is fetched again once it is removed"
        )
    if (there := _there(published, wanted, out)) is not None:
        fetched = _fetch_again(published, there, progress)
    else:
        published.refuse_missing_files()
        with _writer(published, out, root) as writer:
            fetched = _fetch(published, wanted, writer, streams, progress)
        there = wanted
    files = there.files_under(None)
    return Pulled(
        out,
        published.repo,
        published.commit,
        published.root,
        root is not None,
        () if there.absent is None else there.absent.parts,
        len(files),
        sum(file.nbytes for file in files),
        fetched,
        unread,
    )


def _refuse_other_root(published: PublishedStore, out: Path, root: str) -> None:
    if not published.root.startswith(root.lower()) and (out / JOURNAL).exists():
        _writer(published, out, root).close()  # names what was begun, and how to go on with it
    published.refuse_other_root(root)


def _fetch_again(
    published: PublishedStore, there: PackedStore, progress: Callable[[Moved], None] | None
) -> int:
    """Fetch files that a finished pull lacks by now, or that have another size; -> bytes."""
    wrong = {fault.key for fault in sizes(there.root, there.files_under(None))}
    files = [file for file in there.files_under(None) if file.key in wrong]
    damage = [found for file in files if (found := examine(there, file)) is not None]
    if not damage and not any(node_faults(there)):
        return 0
    published.refuse_missing_files()
    total, done = sum(_span(found)[1] - _span(found)[0] for found in damage), 0

    def write(found: FileDamage, sink: Sink) -> None:
        nonlocal done
        for part in cut(found.file, *_span(found)):
            with published.stream(found.file.key, part.begin, part.end) as stream:
                for begin, end in pieces(part):
                    piece = torch.empty(end - begin, dtype=torch.uint8)
                    stream.readinto(bytes_of(piece))
                    sink.write_at(found.file, begin, [piece])
                    done += end - begin
                    if progress is not None:
                        progress(Moved(found.file.key, done, total, 0))

    for made in rewrite(there, damage, write):
        if made.failure is not None and WRONG_SOURCE in made.failure:
            raise SourceError(
                f"{made.key} arrived with other bytes than the manifest pins; {AGAIN}"
            )
        if made.failure is not None:
            raise StoreError(f"{there.root}: {made.key}: {made.failure}")
    return done


def _span(found: FileDamage) -> tuple[int, int]:
    """From the first to the last lost byte of a file."""
    nbytes = found.file.chunk_nbytes
    return (found.chunks[0] * nbytes, (found.chunks[-1] + 1) * nbytes) if found.chunks else (0, 0)


def _fetch(
    published: PublishedStore,
    store: PackedStore,
    writer: StoreWriter,
    streams: int,
    progress: Callable[[Moved], None] | None,
) -> int:
    """Fetch what is missing of `store` and finish it; -> bytes that came over the network."""
    files, absent = store.files_under(None), store.absent
    unwanted = [file for file in published.store.files_under(None) if file not in {*files}]
    if begun := [file for file in unwanted if writer.knows(file)]:
        writer.forget(begun)
    for file in writer.covered_files(files):
        writer.complete(file, store.records[file.key])
    documents = _documents(published, store)
    missing = sum(file.nbytes - writer.allocated(file) for file in files)
    writer.require_space(missing + sum(map(len, documents.values())))
    for file in files:
        if not file.payload_nbytes and not writer.has(file):
            writer.write(file, ())
    with Transfer(published, writer, progress) as transfer:
        transfer.run(files, streams)
    marker = published.marker
    writer.finish_copy(store, documents, marker if absent is None else absent.marker(marker))
    return transfer.fetched


def _documents(published: PublishedStore, store: PackedStore) -> dict[str, bytes]:
    """Every `zarr.json` by key: the root's as published, those of the nodes of `store` made."""
    nodes = store.hierarchy
    documents = metadata_documents(nodes.manifest, nodes.groups, nodes.arrays)
    return documents | {NODE_DOCUMENT: published.document}


def _is_finished(out: Path) -> bool:
    return (out / MARKER).exists() or (out / PART_MARKER).exists()


def _there(published: PublishedStore, wanted: PackedStore, out: Path) -> PackedStore | None:
    """The store in `out`, if it is whole or has what is wanted; damaged or not.

    Raises ConflictError when it is another one.
    """
    if not _is_finished(out):
        return None
    there = PackedStore.open(out, check_files=False)
    if there.manifest["root"] != published.root:
        raise ConflictError(
            f"{out}: it holds the store with root {there.manifest['root']}, {published} has root "
            f"{published.root}; choose another directory or remove it"
        )
    return there if there.absent is None or wanted.absent is not None else None


def _writer(published: PublishedStore, out: Path, root: str | None) -> StoreWriter:
    """The writer of `out`. Raises ConflictError when something else is unfinished there."""
    origin = {"repo": published.repo, "commit": published.commit, "root": published.root}
    try:
        return StoreWriter(out, {"pull": origin})
    except OtherConversionError as error:
        begun = error.begun.get("pull")
        if not isinstance(begun, dict) or not all(isinstance(begun.get(k), str) for k in origin):
            raise ConflictError(
                f"{out}: it holds an unfinished conversion; go on with the same `dsv4 convert`, or "
                "remove the directory, or choose another one"
            ) from None
        if begun["root"] == published.root:  # under another name, or at another commit
            return StoreWriter(out, error.begun)
        command = ["dsv4", "pull", begun["repo"], str(out), "--revision", begun["commit"]]
        if root is not None and begun["root"].startswith(root.lower()):
            command += ["--root", root]
        raise ConflictError(
            f"{out}: it holds an unfinished pull of the store with root {begun['root']}; it was "
            f"begun from {begun['repo']} at commit {begun['commit']}, now it is {published.repo} "
            f"at commit {published.commit} with root {published.root}; go on with "
            f"`{shlex.join(command)}`, or remove the directory, or choose another one"
        ) from None
