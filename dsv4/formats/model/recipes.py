"""Recipes: which tensors are rounded to NVFP4 and which are carried as they are.

Routed experts that are 4 bits wide always become NVFP4, which carries MXFP4 and NVFP4 exactly; a
recipe decides over wider ones (FP8, BF16) and over the dense matrices named here. Norms,
embeddings, biases, hc_*, sinks, ape and tid2eid are never quantised.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence

from dsv4.formats.errors import ConfigError


class Role(enum.StrEnum):
    """What a tensor is to a recipe."""

    EXPERT = "expert"
    ROUTER_GATE = "router gate"
    LM_HEAD = "lm head"
    DENSE = "dense"  # attention projections, shared experts, indexer wq_b
    OTHER = "other"


_BLOCK = r"(?:layers|mtp)\.\d+"
_ROLES = (
    (Role.EXPERT, re.compile(rf"{_BLOCK}\.ffn\.experts\.\d+\.w[123]\.weight")),
    (Role.ROUTER_GATE, re.compile(rf"{_BLOCK}\.ffn\.gate\.weight")),
    (Role.LM_HEAD, re.compile(r"head\.weight")),
    (
        Role.DENSE,
        re.compile(
            rf"{_BLOCK}\.(?:attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)"
            rf"|ffn\.shared_experts\.w[123])\.weight"
        ),
    ),
)


_CUT_BY_COLUMNS = re.compile(r"(?:.*\.)?(?:wo_b|w2)\.weight")

KEEP_GATES = "*.gate.weight"

SAME_EXPERTS = {"standard": (80.2, 100.0), "nvfp4": (73.1, 79.6)}
"""Per cent of (token, layer) that go to the source's experts: gates rounded, gates kept.

Measured by `python -m benchmarks quality examples/tiny-dsv4`, see docs/results.md.
"""


def role_of(name: str) -> Role:
    """The role of the hub-named tensor `name`."""
    for role, pattern in _ROLES:
        if pattern.fullmatch(name):
            return role
    return Role.OTHER


def cut_by_columns(name: str) -> bool:
    """Whether tensor parallelism cuts the hub-named matrix `name` along its input columns."""
    return _CUT_BY_COLUMNS.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe's name, the roles it rounds to NVFP4, and the globs it leaves alone."""

    name: str
    rounded: frozenset[Role]
    keep: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether nothing at all is to be rounded."""
        return not self.rounded

    def rounds(self, name: str) -> bool:
        """Whether the tensor `name` is to be rounded to NVFP4, unless it has 4 bits already."""
        if role_of(name) not in self.rounded:
            return False
        # The names of dialects need torch, which `--help` does not.
        from dsv4.formats.model.user_names import matches

        return not any(matches(glob, name) for glob in self.keep)

    def to_dict(self) -> dict[str, object]:
        """What identifies this recipe in the manifest and on resume."""
        return {"name": self.name, "keep": list(self.keep)}


_ROUNDED = {
    "native": frozenset[Role](),
    "standard": frozenset({Role.EXPERT, Role.ROUTER_GATE, Role.LM_HEAD}),
    "nvfp4": frozenset({Role.EXPERT, Role.ROUTER_GATE, Role.LM_HEAD, Role.DENSE}),
}
RECIPE_NAMES = tuple(_ROUNDED)
DEFAULT_RECIPE = "standard"


def make_recipe(name: str, keep: str | Sequence[str] = ()) -> Recipe:
    """keep: globs of names in any convention, or one glob. Raises ConfigError for a wrong name."""
    keep = (keep,) if isinstance(keep, str) else keep
    if name not in _ROUNDED:
        raise ConfigError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPE_NAMES)}")
    return Recipe(name, _ROUNDED[name], tuple(sorted(set(keep))))
