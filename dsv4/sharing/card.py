"""The model card of a published store: what it was made from, how, what it lost, how to get it.

Its last line holds the SHA-256 of all before it. A card of which that is true was written here and
edited by nobody, so that a later push may write it anew; any other is somebody's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from dsv4.formats.errors import StoreError
from dsv4.formats.model.recipes import role_of
from dsv4.formats.plain_text import counted, printable, size
from dsv4.formats.store.manifest import origin_of
from dsv4.formats.store.nodes import EXPERT
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ATTRIBUTE

MAX_CARD_BYTES = 1 << 24
_SIGNATURE = re.compile(rb"<!-- card written by dsv4, SHA-256 ([0-9a-f]{64}) -->\n\Z")
_LICENCES = (("Apache License", "apache-2.0"), ("MIT License", "mit"))
_LICENCE_HEAD = 4096


@dataclasses.dataclass
class _Kind:
    """Tensors of one role: how many, how many not exact, and the worst relative MSE of these."""

    tensors: int = 0
    inexact: int = 0
    worst: float = 0.0


def write_card(store: PackedStore, repo: str, branch: str | None = None) -> bytes:
    """The card of `store` as `repo` shows it, on `branch` if it is not the main one.

    Raises StoreError for a loss that is no number.
    """
    manifest = store.manifest
    origin, recipe = origin_of(manifest), manifest["recipe"]
    licence = _licence(store)
    more = {"base_model_relation": "quantized"} if "repo" in origin else {}
    head = ModelCardData(
        base_model=origin.get("repo"),
        license=licence,
        license_name="license" if licence == "other" else None,
        license_link=_licence_file(store) if licence == "other" else None,
        library_name="dsv4",
        tags=["deepseek-v4", "nvfp4", "zarr", "dsv4"],
        **more,  # type: ignore[arg-type]  # extra fields of the hub's own
    )
    source = "a local directory"
    if "repo" in origin:
        source = f"[{origin['repo']}](https://huggingface.co/{origin['repo']})"
        source += f" at commit `{origin['commit']}`"
    name, keep = _plain(recipe.get("name")), recipe.get("keep") or ()
    keeps = "".join(f" `--keep {_plain(glob)}`" for glob in keep)
    place = f"{repo} ./packed" + (f" --revision {shlex.quote(_plain(branch))}" if branch else "")
    nbytes = sum(record.nbytes for record in store.records.values())
    text = f"""---
{head.to_yaml().strip()}
---

# {repo}

A packed store of DeepSeek-V4 for dsv4: weights in the order in
which kernels read them, every byte under one root.

| | |
| --- | --- |
| made from | {source} |
| recipe | `{name}`{keeps} |
| made by | {_plain(manifest["tool"])} |
| size | {size(nbytes)} in {counted(len(store.records), "file")} |
| root | `{manifest["root"]}` |

## Get it and run it

```
dsv4 pull {place} --root {manifest["root"]}
dsv4 run ./packed
```

`pull` proves every byte against the root. {_proof(origin)}

## What rounding lost

{_losses(store)}

"""
    body = text.encode()
    return body + b"<!-- card written by dsv4, SHA-256 %b -->\n" % _digest(body)


def is_ours(card: bytes) -> bool:
    """Whether the card was written by `write_card` and edited by nobody."""
    found = _SIGNATURE.search(card)
    return found is not None and found[1] == _digest(card[: found.start()])


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _plain(value: object) -> str:
    """A text of the manifest that cannot be taken for Markdown."""
    return re.sub(r"[`|<>\[\]]", "?", printable(str(value), 80))


def _proof(origin: Mapping[str, Any]) -> str:
    if "repo" not in origin:
        return "Whoever packs the same files by the same recipe and tool gets the same root."
    source = f"{origin['repo']} --revision {origin['commit']}"
    return (
        f"Whoever runs `dsv4 convert --hf {source}` by the same recipe and tool gets the same root."
    )


def _licence_file(store: PackedStore) -> str | None:
    """The path of the licence that travels along."""
    names = sorted(name for name in store.assets if name.startswith("LICENSE"))
    return f"assets/{names[0]}" if names else None


def _licence(store: PackedStore) -> str | None:
    """The hub's name of the licence that travels along; "other" for one that is not known here."""
    path = _licence_file(store)
    if path is None:
        return None
    with (store.root / path).open("rb") as file:
        head = file.read(_LICENCE_HEAD).decode(errors="replace")
    return next((name for words, name in _LICENCES if words in head), "other")


def _losses(store: PackedStore) -> str:
    """A table by kind of tensor, or that there was none."""
    kinds: dict[str, _Kind] = {}
    for name, count, own in _tensors(store):
        kind = kinds.setdefault(str(role_of(name)), _Kind())
        kind.tensors += count
        if own["exact"]:
            continue
        inexact = own.get("inexact")
        kind.inexact += len(inexact) if isinstance(inexact, dict) else count
        loss = own.get("loss")
        worst = loss.get("rel_mse") if isinstance(loss, dict) else own.get("rel_mse")
        if not isinstance(worst, int | float):
            raise StoreError(f"{store.root}: {name} has no loss, though it is not exact")
        kind.worst = max(kind.worst, worst)
    total = sum(kind.tensors for kind in kinds.values())
    lossy = sum(kind.inexact for kind in kinds.values())
    if not lossy:
        return f"Nothing: all {counted(total, 'tensor')} are exact, counted while they were made."
    lines = ["| kind | tensors | not exact | worst relative MSE |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {kind.tensors:,} | {kind.inexact:,} | {kind.worst:.3e} |"
        for name, kind in kinds.items()
        if kind.inexact
    ]
    exact = f"{total - lossy:,} of {total:,} tensors are exact, counted while they were made."
    return "\n".join([*lines, "", exact])


def _tensors(store: PackedStore) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(hub name of one, how many, attributes) of every array or group that holds tensors."""
    contents = store.contents
    for name, path in contents.plain.items():
        yield name, 1, store.hierarchy.arrays[path].attributes[ATTRIBUTE]
    for name, group in contents.matrices.items():
        yield name, 1, group.attributes
    for stack in contents.stacks.values():
        count = (stack.experts or 0) * len(stack.names)
        yield stack.names[0].replace(EXPERT, "0"), count, stack.attributes
