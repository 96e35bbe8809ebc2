"""`--keep`: a pattern that keeps nothing is refused, with the nearest one that would."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from dsv4.convert.plan import Plan
from dsv4.formats.errors import ConfigError
from dsv4.formats.model.recipes import Recipe, make_recipe
from dsv4.formats.model.source_tensor import Encoding
from dsv4.formats.model.user_names import matches, names_of
from dsv4.formats.plain_text import counted, first

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ALIKE = 0.5  # what is less like the pattern is not worth naming
_NEARER = 0.1  # by how much a name that is carried anyway has to be nearer to be named


def refuse_idle_keep(plan: Plan) -> None:
    """Raise ConfigError for a pattern of `--keep` without which the plan would be the same.

    It matches no tensor, by the hub's names or by transformers', or only tensors that the recipe
    carries in any case.
    """
    if not plan.recipe.keep:
        return
    bare = make_recipe(plan.recipe.name)
    names = list(plan.inventory.by_name)
    rounded = list(_rounded(plan, bare))
    for glob in plan.recipe.keep:
        if any(matches(glob, name) for name in rounded):
            continue
        found = [name for name in names if matches(glob, name)]
        if found:
            raise ConfigError(
                f"--keep {glob!r} matches nothing that recipe {bare.name} would round: "
                f"{counted(len(found), 'tensor is', 'tensors are')} carried anyway "
                f"({first(found)}); {_what_is_rounded(rounded)}"
            )
        raise ConfigError(f"--keep {glob!r} matches no tensor; {_nearest(glob, rounded, names)}")


def _rounded(plan: Plan, bare: Recipe) -> Iterator[str]:
    """Names of the tensors that the recipe rounds where nothing is kept."""
    for name, tensor in plan.inventory.by_name.items():
        if tensor.encoding in (Encoding.FP8, Encoding.PLAIN) and bare.rounds(name):
            yield name


def _what_is_rounded(rounded: list[str]) -> str:
    if not rounded:
        return "it rounds nothing here, so leave --keep out"
    kinds = list(dict.fromkeys(_NUMBER.sub("*", name) for name in rounded))
    return f"it rounds {', '.join(kinds[:4])}{', ...' if len(kinds) > 4 else ''}"


def _nearest(glob: str, rounded: list[str], names: list[str]) -> str:
    """What may have been meant."""
    (ours, like), (others, liker) = _closest(glob, rounded), _closest(glob, names)
    if liker > max(like + _NEARER, _ALIKE):
        return f"the nearest is {others!r}, which is carried anyway; {_what_is_rounded(rounded)}"
    return f"did you mean {ours!r}?" if like > _ALIKE else _what_is_rounded(rounded)


def _closest(glob: str, names: Iterable[str]) -> tuple[str, float]:
    """-> (the nearest of the candidates, how like the pattern it is, from 0 to 1)."""
    matcher = difflib.SequenceMatcher(None, b=glob, autojunk=False)
    best, most = "", 0.0
    for text in _candidates(glob, names):
        matcher.set_seq1(text)
        if matcher.real_quick_ratio() > most and (like := matcher.ratio()) > most:
            best, most = text, like
    return best, most


def _candidates(glob: str, names: Iterable[str]) -> list[str]:
    """Names with the pattern's own numbers, and globs over all numbers, whole and cut in front."""
    numbers = re.findall(r"\d+", glob)
    found: dict[str, None] = {}
    seen: set[str] = set()
    for name in names:
        exact = bool(numbers) and _NUMBER.findall(name) == numbers
        template = _NUMBER.sub("*", name)
        if template in seen and not exact:
            continue
        seen.add(template)
        for one in names_of(name):
            parts = _NUMBER.sub("*", one).split(".")
            forms = [one] if exact else []
            forms += [".".join(parts)]
            forms += ["*." + ".".join(parts[start:]) for start in range(1, len(parts) - 1)]
            found |= dict.fromkeys(forms)
            if glob.endswith("*"):
                found |= dict.fromkeys(form.rpartition(".")[0] + ".*" for form in forms)
    return [form for form in found if "*.*" not in form]
