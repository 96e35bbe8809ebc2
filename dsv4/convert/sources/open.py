"""From what a user gives to a source: a directory, a repository on the hub, or its address."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.formats.errors import SourceError
from dsv4.formats.file_kinds import HEAD_BYTES, kind_of

if TYPE_CHECKING:
    from dsv4.convert.sources.base import Source

_PART = r"[A-Za-z0-9_][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_AT_REVISION = re.compile(rf"(?P<repo>{_PART}/{_PART})@(?P<revision>[\w./-]+)", re.ASCII)
_ADDRESS = re.compile(r"https?://|hf://|(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_OTHER_REPOSITORIES = frozenset({"datasets", "spaces", "collections", "papers", "api"})


def open_source(
    src: str | Path,
    revision: str | None = None,
    *,
    on_wait: Callable[[str], None] | None = None,
) -> Source:
    """The checkpoint `src`: a directory, else a hub id `org/name` at `revision`, or its address.

    A directory of that name wins. An address may name the revision: `.../tree/REV`.
    on_wait: of the source, from its opening on.
    Raises SourceError, also for a revision of a directory.
    """
    hub = check_name(src, revision)
    if hub is None:
        from dsv4.convert.sources.local import LocalSource

        return LocalSource(src)
    # huggingface_hub takes half a second to import and is of use here only.
    from dsv4.convert.sources.hub import HubSource

    return HubSource(*hub, on_wait=on_wait)


def check_name(src: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """What `src` names: (hub id, revision), or None for a directory.

    No checkpoint is opened, and torch is not imported. Raises as `open_source` for a wrong name.
    """
    if os.path.isdir(src):  # noqa: PTH112  # False for every string that can be no path
        if revision is not None:
            raise SourceError(f"--revision {revision} has no meaning for the directory {src}")
        return None
    text = str(src)
    if os.path.exists(src):  # noqa: PTH110
        raise SourceError(_about_file(Path(src)))
    if isinstance(src, Path) or text.startswith((".", "/", "~")):
        raise SourceError(f"there is no directory {text}; give one, or a hub id such as org/name")
    return hub_name(text, revision, or_directory=True)


def hub_name(
    text: str, revision: str | None = None, *, or_directory: bool = False
) -> tuple[str, str | None]:
    """What `text` names on a hub: (hub id, revision); an address may name the revision.

    or_directory: whether a directory could have been given as well, so that a refusal says so.

    Raises SourceError for what is neither a hub id nor an address of a repository.
    """
    if _ADDRESS.match(text):
        address, (text, named) = text, _repository(text)
        if None not in (named, revision) and named != revision:
            raise SourceError(
                f"--revision {revision} contradicts {address:.200}; give {text} and one revision"
            )
        revision = revision or named
    if at := _AT_REVISION.fullmatch(text):
        raise SourceError(
            f"{text:.200} is not a hub id; give {at['repo']} and --revision {at['revision']}"
        )
    if not or_directory and not _HUB_ID.fullmatch(text):
        raise SourceError(f"{text!r:.200} is not a hub id; give one such as org/name")
    if text.count("/") > 1:
        raise SourceError(f"there is no directory {text}; give one, or a hub id such as org/name")
    if not _HUB_ID.fullmatch(text):
        raise SourceError(
            f"{text!r:.200} is neither a directory nor a hub id such as org/name; give one of them"
        )
    return text, revision


def _about_file(path: Path) -> str:
    """The sentence about a file that was given for a directory."""
    kind = None
    if path.is_file():
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        kind = kind_of(head, json=path.suffix != ".safetensors")
    what = kind if kind is not None and not kind.startswith("text") else "a file"
    if path.suffix == ".safetensors" and kind is None:
        what = "one file of a checkpoint"
    return f"{path} is {what}; give the directory of a checkpoint"


def _repository(address: str) -> tuple[str, str | None]:
    """-> (hub id, revision or None) of the address of a repository's page."""
    full = address if "://" in address else f"https://{address}"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        url, hub = urllib.parse.urlsplit(full), urllib.parse.urlsplit(endpoint)
    except ValueError:
        raise SourceError(
            f"{address!r:.200} is not an address; give a hub id such as org/name, or a directory"
        ) from None
    host = url.netloc.lower()
    path = [urllib.parse.unquote(part) for part in url.path.split("/") if part]
    if url.scheme.lower() == "hf":  # hf://org/name
        path, host = [url.netloc, *path], "hf.co"
    repo, rest = "/".join(path[:2]), path[2:]
    if len(path) < 2 or path[0] in _OTHER_REPOSITORIES or not _HUB_ID.fullmatch(repo):
        raise SourceError(
            f"{address:.200} is not the address of a model on the hub; give a hub id such as "
            "org/name, or a directory"
        )
    if host not in {*_HUB_HOSTS, hub.netloc.lower()}:
        raise SourceError(
            f"{address:.200} is not on {hub.netloc}; give {repo}, with "
            f"HF_ENDPOINT={url.scheme}://{url.netloc} if that is a hub"
        )
    named = "/".join(rest[1:])
    if not rest or rest == ["tree"]:
        return repo, None
    if rest[0] == "tree" and (len(rest) == 2 or named.startswith("refs/")):
        return repo, named
    raise SourceError(
        f"{address:.200} is the address of something in a repository, expected the repository's; "
        f"give {repo}"
    )
