"""The model card of a published store: what it was made from, how, what it lost, how to get it.

Its last line holds the SHA-256 of all before it. A card of which that is true was written here and
edited by nobody, so that a later push may write it anew; any other is somebody's own.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from dsv4.formats.model.recipes import Role, role_of
from dsv4.formats.plain_text import counted, printable, size
from dsv4.formats.store.losses import inexact_tensors
from dsv4.formats.store.manifest import origin_of
from dsv4.formats.store.reader import PackedStore

MAX_CARD_BYTES = 1 << 24
_SIGNATURE = re.compile(rb"<!-- card written by dsv4, SHA-256 ([0-9a-f]{64}) -->\n\Z")
_LICENCES = (("Apache License", "apache-2.0"), ("MIT License", "mit"))
_LICENCE_HEAD = 4096


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
    contents = store.contents
    experts = (name for name, *_ in contents.expert_names())
    tensors = Counter(role_of(name) for name in (*contents.plain, *contents.matrices, *experts))
    worst: dict[Role, float] = {}
    lossy: Counter[Role] = Counter()
    for name, rel_mse in inexact_tensors(store):
        role = role_of(name)
        lossy[role] += 1
        worst[role] = max(worst.get(role, 0.0), rel_mse)
    total = tensors.total()
    if not lossy:
        return f"Nothing: all {counted(total, 'tensor')} are exact, counted while they were made."
    lines = ["| kind | tensors | not exact | worst relative MSE |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {role} | {tensors[role]:,} | {lossy[role]:,} | {worst[role]:.3e} |"
        for role in tensors
        if role in lossy
    ]
    exact = (
        f"{total - lossy.total():,} of {total:,} tensors are exact, counted while they were made."
    )
    return "\n".join([*lines, "", exact])
