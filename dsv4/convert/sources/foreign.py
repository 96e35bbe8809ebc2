"""What was given instead of a checkpoint, told by the names in it: one sentence each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from dsv4.convert.sources.base import CONFIG_FILE, INDEX_FILE
from dsv4.convert.sources.index import first_names, is_shard_name
from dsv4.formats.errors import SourceError
from dsv4.formats.plain_text import printable
from dsv4.formats.store.specs import JOURNAL, MARKER

GIVE = f"give the directory with {CONFIG_FILE} and the safetensors files"

_ADAPTER = re.compile(r"adapters?(_model)?([-_.][\w.-]*)?\.(safetensors|bin)")
_RANKS = re.compile(r"model\d+-mp(?P<ranks>\d+)\.safetensors")
_CONSOLIDATED = re.compile(r"consolidated[\w.-]*\.(safetensors|pth|pt)")
_GGUF = re.compile(r".*\.(gguf|ggml)", re.IGNORECASE)
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|distcp)", re.IGNORECASE)
_CACHED_REPO = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG_BELOW = re.compile(rf"(?P<folder>[^/.][^/]*)/{re.escape(CONFIG_FILE)}")
_CODE_FOLDERS = frozenset({"inference", "original", "encoding", "assets"})


def top_level(name: str) -> str:
    """The name itself, or the folder at the top level that it is in, with a "/"."""
    folder, slash, _ = name.partition("/")
    return folder + slash


def is_set_aside(name: str) -> bool:
    """Whether a safetensors file is, by its name, no part of a checkpoint in the hub's format."""
    return any(kind.fullmatch(name) for kind in (_ADAPTER, _RANKS, _CONSOLIDATED))


def refuse_foreign(names: Collection[str], where: str) -> None:
    """Raise SourceError, saying what the source is, when it can be no checkpoint of ours.

    names: of files, and of folders with a "/" at the end or with what is in them after it.
    """
    top = sorted({top_level(name) for name in names})
    if MARKER in top or JOURNAL in top:
        raise SourceError(
            f"{where} is a packed checkpoint already, or one that is being packed; give the "
            "checkpoint that it was made from"
        )
    shards = [name for name in top if is_shard_name(name) and not is_set_aside(name)]
    if CONFIG_FILE in top and (shards or INDEX_FILE in top):
        return
    sentence = _cache(top, where) or (None if shards else _other_weights(top, where))
    if sentence is None and CONFIG_FILE not in top:
        sentence = _without_config(names, shards, where)
    if sentence is not None:
        raise SourceError(sentence)


def _cache(top: Collection[str], where: str) -> str | None:
    """A folder of the hub's cache above the snapshot that is meant; folders come with a "/"."""
    folders = [name.removesuffix("/") for name in top if name.endswith("/")]
    last = where.rstrip("/").rpartition("/")[2]
    if "snapshots" in folders and {"refs", "blobs"} & {*folders}:
        repo = _CACHED_REPO.fullmatch(last)
        name = f"the hub id {repo['org']}/{repo['name']}, or " if repo else ""
        return (
            f"{where} is a repository's folder in the hub's cache, with the checkpoint further "
            f"down; give {name}a directory in {where.rstrip('/')}/snapshots"
        )
    if repos := [found for folder in folders if (found := _CACHED_REPO.fullmatch(folder))]:
        return (
            f"{where} is the hub's cache; give the hub id of a repository in it, such as "
            f"{repos[0]['org']}/{repos[0]['name']}"
        )
    if commits := [folder for folder in folders if _COMMIT.fullmatch(folder)]:
        return f"{where} holds snapshots of a repository; give one, such as {where}/{commits[0]}"
    return None


def _other_weights(top: Collection[str], where: str) -> str | None:
    """What the weights are where none is a shard of the hub's format."""

    def matching(kind: re.Pattern[str]) -> list[str]:
        return [name for name in top if kind.fullmatch(name)]

    if matching(_ADAPTER) or "adapter_config.json" in top:
        found = matching(_ADAPTER) or ["adapter_config.json"]
        return (
            f"{where} is an adapter ({_shown(found)}), not a whole checkpoint; merge it into its "
            "base model and give the result"
        )
    if found := matching(_RANKS):
        ranks = int(_RANKS.fullmatch(found[0])["ranks"])  # type: ignore[index]  # it matched
        gpus = f"{ranks} GPU" + ("s" if ranks != 1 else "")
        return (
            f"{where} was split for {gpus} by DeepSeek's own inference code ({_shown(found)}); "
            "give the checkpoint that it was made from"
        )
    if found := matching(_CONSOLIDATED):
        return (
            f"{where} has consolidated files ({_shown(found)}), which are not in the hub's format; "
            "give a checkpoint in the hub's format"
        )
    if found := matching(_GGUF):
        return (
            f"{where} has GGUF files ({_shown(found)}) and no safetensors files; give the "
            "checkpoint of safetensors files that they were made from"
        )
    if found := matching(_PICKLES):
        return (
            f"{where} has its weights in pickles ({_shown(found)}), which are never opened; give "
            "a checkpoint of safetensors files"
        )
    return None


def _without_config(names: Iterable[str], shards: Collection[str], where: str) -> str:
    if shards:
        return (
            f"{where} has safetensors files but no {CONFIG_FILE}; put the {CONFIG_FILE} of the "
            "same checkpoint beside them"
        )
    below = sorted(
        found["folder"]
        for found in map(_CONFIG_BELOW.fullmatch, names)
        if found and found["folder"] not in _CODE_FOLDERS
    )
    if below:
        return (
            f"{where} has no {CONFIG_FILE}, but its folder {_shown(below)} has one; give a folder"
        )
    return f"{where} is not a checkpoint: it has no {CONFIG_FILE}; {GIVE}"


def _shown(names: Iterable[str]) -> str:
    return printable(first_names(sorted(names)), 300)
