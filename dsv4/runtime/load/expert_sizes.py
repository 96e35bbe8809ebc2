"""How large routed experts are.

An expert's *record* is the bytes of its w13 and w2, codes and scales, wherever they lie; global
scales, 12 bytes an expert, lie with the core.
"""

from __future__ import annotations

import dataclasses

from dsv4.formats.numeric.slices import share as rank_share
from dsv4.formats.store.matrix_views import Nodes
from dsv4.runtime.load.plan import ALONE, Part, Share, plan_load

IN_RECORD = ("codes", "scales", "weight")  # of the arrays of a stack


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
    def record_nbytes(self) -> int:
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
