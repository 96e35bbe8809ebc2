"""Whether an unfinished conversion is the one that is asked for, and what to do when it is not.

The journal keeps in the clear what it was begun with; a refusal compares that with what is asked
for now, names what differs, and prints the command that goes on with what is there.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4.convert.sources.base import Source
from dsv4.formats.errors import ConflictError, OtherConversionError
from dsv4.formats.model.recipes import DEFAULT_RECIPE, Recipe
from dsv4.formats.version import TOOL


def identity_of(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What a conversion is begun with: tool, recipe, and the source with where it lies."""
    return {
        "tool": TOOL,
        "recipe": recipe.to_dict(),
        "source": {**source.origin, "fingerprint": source.fingerprint()},
    }


def refusal(error: OtherConversionError, src: str | Path, out: Path) -> ConflictError:
    """What the user can act on. src: the source as it was given now, a directory or a hub id."""
    begun, now = error.begun, error.now
    if "pull" in begun:
        return ConflictError(
            f"{out}: it holds what `dsv4 pull` began to fetch; go on with that command, or remove "
            "the directory, or choose another one"
        )
    try:
        differences = "; ".join(_differences(begun, now))
        command = _command(begun, now, src, out)
    except (AttributeError, LookupError, TypeError):
        return error  # a journal that was edited by hand
    if begun["tool"] != now["tool"]:
        advice = f"go on with {begun['tool']}"
    elif command is None:
        advice = "go on with the source as it was"
    else:
        advice = f"go on with `{command}`"
    return ConflictError(
        f"{out}: it holds another unfinished conversion: {differences}; {advice}, or remove "
        "the directory, or choose another one"
    )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One clause for the tool, the recipe and the source, where they differ."""
    if begun["tool"] != now["tool"]:
        yield f"it was begun by {begun['tool']}, this is {now['tool']}"
    if begun["recipe"] != now["recipe"]:
        yield f"it was begun by recipe {_recipe(begun)}, now it is {_recipe(now)}"
    there, here = begun["source"], now["source"]
    if there == here:
        return
    if there["kind"] != here["kind"] or there.get("repo") != here.get("repo"):
        yield f"it was begun from {_place(there)}, now it is {_place(here)}"
    elif there.get("commit") != here.get("commit"):
        yield f"it was begun from commit {there['commit']}, now it is {here['commit']}"
    else:
        yield "the files of the source are not those it was begun from"


def _recipe(identity: Mapping[str, Any]) -> str:
    keep = [f" --keep {shlex.quote(glob)}" for glob in identity["recipe"]["keep"]]
    return str(identity["recipe"]["name"]) + "".join(keep)


def _place(source: Mapping[str, Any]) -> str:
    if source["kind"] == "hub":
        return f"{source['repo']} at commit {source['commit']}"
    return "a local directory"


def _command(
    begun: Mapping[str, Any], now: Mapping[str, Any], src: str | Path, out: Path
) -> str | None:
    """The command that goes on with what is there; None where its source is not at hand."""
    there, here = begun["source"], now["source"]
    command = ["dsv4", "convert", "--hf"]
    if there["kind"] == "hub":
        command += [there["repo"], "--revision", there["commit"]]
    elif there == here:
        command += [str(src)]
    elif here["kind"] == "hub":
        command += ["DIRECTORY"]
    else:
        return None
    command += ["--out", str(out)]
    if begun["recipe"]["name"] != DEFAULT_RECIPE:
        command += ["--recipe", begun["recipe"]["name"]]
    for glob in begun["recipe"]["keep"]:
        command += ["--keep", glob]
    return shlex.join(command)
