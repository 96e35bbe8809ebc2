"""What the warps of a cluster tell each other: a slot for each warp, in every CTA's shared memory.

A warp's lane j writes to CTA j, so that after one barrier of the cluster everybody reads all slots
in its own shared memory, in the order of the warps.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, range_constexpr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

LANES = 32


@dsl_user_op
def _push(place: Int32, rank: Int32, value: Any, *, loc: Any = None, ip: Any = None) -> None:
    """`value` to byte `place` of the shared memory of a CTA of the cluster."""
    wide = value.width == 64
    kind, constraint = ("u64", "l") if wide else ("u32", "r")
    llvm.inline_asm(
        None,
        [
            place.ir_value(loc=loc, ip=ip),
            rank.ir_value(loc=loc, ip=ip),
            value.ir_value(loc=loc, ip=ip),
        ],
        "{ .reg .u32 a; mapa.shared::cluster.u32 a, $0, $1; "
        f"st.shared::cluster.{kind} [a], $2; }}",
        f"r,r,{constraint}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


class Slots:
    """A number of each warp of the cluster. dtype: Uint32 or Uint64."""

    def __init__(self, dtype: Any, ctas: int, warps: int) -> None:
        self.dtype, self.ctas, self.warps = dtype, ctas, warps
        self.turns = -(-ctas * warps // LANES)

    def allocate(self, smem: Any) -> Any:
        """Shared memory for them."""
        return smem.allocate_tensor(self.dtype, cute.make_layout(self.turns * LANES), 16)

    @cute.jit
    def tell(self, slots: Any, warp: Int32, value: Any) -> None:
        """Write the number of the cluster's warp `warp`, equal in its lanes, to all CTAs."""
        place = Int32(slots.iterator.toint()) + warp * (self.dtype.width // 8)
        lane = cute.arch.lane_idx()
        if lane < self.ctas:
            _push(place, lane, value)

    @cute.jit
    def largest(self, slots: Any) -> Any:
        """Of all warps; of Uint32."""
        most = Uint32(0)
        for turn in range_constexpr(self.turns):
            at = turn * LANES + cute.arch.lane_idx()
            if at < self.ctas * self.warps:
                most = cutlass.max(most, slots[at])
        return cute.arch.warp_redux_sync(most, "umax")

    @cute.jit
    def total(self, slots: Any) -> Any:
        """The sum over all warps; of Uint32."""
        all_of = Uint32(0)
        for turn in range_constexpr(self.turns):
            at = turn * LANES + cute.arch.lane_idx()
            if at < self.ctas * self.warps:
                all_of += slots[at]
        return cute.arch.warp_redux_sync(all_of, "add")

    @cute.jit
    def total_and_before(self, slots: Any, warp: Int32) -> Any:
        """The sum over all warps, and over those before `warp`."""
        all_of, before = self.dtype(0), self.dtype(0)
        for turn in range_constexpr(self.turns):
            at = turn * LANES + cute.arch.lane_idx()
            if at < self.ctas * self.warps:
                all_of += slots[at]
                if at < warp:
                    before += slots[at]
        return warp_sum(all_of), warp_sum(before)


@cute.jit
def tell_all(shared: Any, ctas: cutlass.Constexpr[int], values: Any) -> None:
    """Numbers, equal in a warp's lanes, to every CTA's `shared`."""
    lane = cute.arch.lane_idx()
    if lane < ctas:
        for i in range_constexpr(len(values)):
            _push(Int32(shared.iterator.toint()) + 4 * i, lane, values[i])


def warp_sum(value: Any) -> Any:
    """The sum over a warp's lanes, in all of them."""
    for power in range(5):
        value = value + cute.arch.shuffle_sync_bfly(value, 1 << power)
    return value


@cute.jit
def running_sum(value: Any) -> Any:
    """The sum over the lanes up to this one."""
    lane = cute.arch.lane_idx()
    for power in range_constexpr(5):
        lower = cute.arch.shuffle_sync_up(value, 1 << power, mask_and_clamp=0)
        if lane >= (1 << power):
            value += lower
    return value


def meet() -> None:
    """A barrier of the cluster: what was written before it is seen after it."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
