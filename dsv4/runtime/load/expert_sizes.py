"""How large routed experts are, how many fit, which are best kept, and what the others then cost.

Arithmetic on sizes and counts alone. An expert's *record* is the bytes of its w13 and w2, codes and
scales, wherever they lie; global scales, 12 bytes an expert, lie with the core.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.slices import share as rank_share
from dsv4.formats.store.matrix_views import Nodes
from dsv4.runtime.load.plan import ALONE, Part, Share, plan_load

IN_RECORD = ("codes", "scales", "weight")  # of the arrays of a stack

Counts = Sequence[Sequence[int]]
"""How often each expert was chosen, by layer."""


@dataclasses.dataclass(frozen=True)
class ExpertSizes:
    """Of one rank. records: bytes of one expert's, by layer; experts: of a layer; others: bytes of
    the stacks that are not in records.
    """

    records: tuple[int, ...]
    experts: int
    others: int

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.experts * len(self.records)

    @property
    def slot(self) -> int:
        """Bytes that hold any expert's record."""
        return max(self.records, default=0)

    @property
    def nbytes(self) -> int:
        """Of all records."""
        return self.experts * sum(self.records)


def expert_sizes(store: Nodes, share: Share = ALONE) -> ExpertSizes:
    """Of the main model's experts. Raises RuntimeRefusal for a store that has none."""
    plan = plan_load(store, {Part.EXPERTS}, share)
    count = store.config.n_routed_experts
    if share.experts == "expert":
        first, last = rank_share(count, share.rank, share.world)
        count = last - first
    layers: dict[str, int] = {}
    others = 0
    for path, placed in plan.arrays.items():
        group, _, member = path.rpartition("/")
        if member in IN_RECORD:
            layer = group.rpartition("/")[0]
            layers[layer] = layers.get(layer, 0) + placed.nbytes // count
        else:
            others += placed.nbytes
    return ExpertSizes(tuple(layers.values()), count, others)


def residents(sizes: ExpertSizes, budget: int) -> int:
    """How many experts of all layers a device keeps in `budget` bytes."""
    return min(sizes.total, max(budget, 0) // sizes.slot) if sizes.slot else 0


def best_residents(counts: Counts, slots: int) -> list[set[int]]:
    """The experts to keep, by layer: those that were chosen most often; equal ones in order."""
    order = sorted(
        (-count, layer, expert)
        for layer, own in enumerate(counts)
        for expert, count in enumerate(own)
    )
    kept: list[set[int]] = [set() for _ in counts]
    for _, layer, expert in order[:slots]:
        kept[layer].add(expert)
    return kept


def misses_a_token(counts: Counts, kept: Sequence[set[int]], top_k: int) -> float:
    """Choices of a token that meet an expert which is not kept, over all layers, if tokens choose
    as often as `counts` says. A layer that was never counted is taken as uniform.
    """
    misses = 0.0
    for own, here in zip(counts, kept, strict=True):
        whole = sum(own)
        there = sum(own[expert] for expert in here) / whole if whole else len(here) / len(own)
        misses += top_k * (1 - there)
    return misses


def uniform_misses(sizes: ExpertSizes, slots: int, top_k: int) -> float:
    """The same when nothing is known of what tokens choose."""
    return top_k * len(sizes.records) * (1 - slots / sizes.total)


def read_counts(path: Path, layers: int, experts: int) -> Counts:
    """The counts of decoded tokens in a routes file: `{"decode": [[count of an expert, ...] of a
    layer, ...], ...}`.

    Raises RuntimeRefusal for a file that is not one, or is of a model of another shape.
    """
    try:
        found: Any = json.loads(path.read_bytes())["decode"]
        sizes = {len(own) for own in found}
        right = all(type(n) is int and n >= 0 for own in found for n in own)
    except OSError as error:
        raise RuntimeRefusal(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise RuntimeRefusal(
            f"{path} is not a routes file, expected JSON with a list of counts for each layer as "
            '"decode"; `dsv4 run --routes FILE` writes one'
        )
    if len(found) != layers or sizes != {experts}:
        raise RuntimeRefusal(
            f"{path} counts {len(found)} layers of {max(sizes, default=0)} experts, this model has "
            f"{layers} of {experts}; give the file that was counted with this model"
        )
    counts: Counts = found
    return counts
