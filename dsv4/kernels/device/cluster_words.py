"""What the CTAs of a cluster tell each other, without a barrier of the cluster.

Numbers go straight into the other CTAs' shared memory, and with their bytes complete a phase of a
memory barrier there, so that nobody flushes anything. Sums have two places in turn: who is told
number n + 1 knows that everybody has read number n - 1.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, Uint64, range_constexpr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

LANES = 32
_HALF = 2 * LANES  # places for the numbers of the warps of a CTA, then of the CTAs
_KEYS, _SUMS, _CHOICE, _BARRIERS = 0, 1, 3, 4


@dsl_user_op
def _push(
    place: Int32, barrier: Int32, rank: Int32, value: Any, *, loc: Any = None, ip: Any = None
) -> None:
    """`value` to byte `place` of a CTA of the cluster, counted by its barrier."""
    kind, constraint = ("u64", "l") if value.width == 64 else ("u32", "r")
    llvm.inline_asm(
        None,
        [one.ir_value(loc=loc, ip=ip) for one in (place, barrier, rank, value)],
        "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, $0, $2; mapa.shared::cluster.u32 b, $1, $2; "
        f"st.async.shared::cluster.mbarrier::complete_tx::bytes.{kind} [a], $3, [b]; }}",
        f"r,r,r,{constraint}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


class Cluster:
    """ctas: at most 16, all of the grid's first dimension; warps: of a CTA, at most 32."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.ctas, self.warps = ctas, warps

    @cute.jit
    def begin(self) -> Any:
        """Shared memory, ready once all CTAs have called `begun`. Announces this CTA."""
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_tensor(Int64, cute.make_layout(_BARRIERS), 16)
        sums = smem.allocate_tensor(Uint64, cute.make_layout(2 * _HALF), 16)
        counts = smem.allocate_tensor(Uint32, cute.make_layout(2 * _HALF), 16)
        keys = smem.allocate_tensor(Uint32, cute.make_layout(_HALF), 16)
        choice = smem.allocate_tensor(Uint64, cute.make_layout(1), 16)
        if cute.arch.thread_idx()[0] == 0:
            for i in range_constexpr(_BARRIERS):
                cute.arch.mbarrier_init(barriers.iterator + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.cluster_arrive_relaxed()
        return barriers, sums, counts, keys, choice

    def begun(self) -> None:
        """Wait for all CTAs' shared memory."""
        cute.arch.cluster_wait()

    @cute.jit
    def largest(self, shared: Any, own: Uint32) -> Uint32:
        """The largest number of all warps. Once."""
        barriers, _, _, keys, _ = shared
        lane = cute.arch.lane_idx()
        barrier = barriers.iterator + _KEYS
        if lane == 0:
            keys[cute.arch.warp_idx()] = own
        cute.arch.sync_threads()
        if cute.arch.warp_idx() == 0:
            of_cta = cute.arch.warp_redux_sync(_if(lane < self.warps, keys[lane]), "umax")
            _expect(barrier, 4 * self.ctas)
            self._tell(keys, barrier, LANES, of_cta)
        cute.arch.mbarrier_wait(barrier, 0)
        return cute.arch.warp_redux_sync(_if(lane < self.ctas, keys[LANES + lane]), "umax")

    @cute.jit
    def share(self, shared: Any, number: Int32, own: Uint64, ranked: Uint32) -> Any:
        """The sum of all warps' `own`, that of the warps before this one, the sum of `ranked`.

        number: how many times it was called before.
        """
        barriers, sums, counts, _, _ = shared
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        base = (number % 2) * _HALF
        barrier = barriers.iterator + _SUMS + number % 2
        if lane == 0:
            sums[base + warp], counts[base + warp] = own, ranked
        cute.arch.sync_threads()
        if warp == 0:
            of_cta = warp_sum(_if(lane < self.warps, sums[base + lane]))
            ranked = cute.arch.warp_redux_sync(_if(lane < self.warps, counts[base + lane]), "add")
            _expect(barrier, 12 * self.ctas)
            self._tell(sums, barrier, base + LANES, of_cta)
            self._tell(counts, barrier, base + LANES, ranked)
        cute.arch.mbarrier_wait(barrier, (number // 2) % 2)
        of_ctas = _if(lane < self.ctas, sums[base + LANES + lane])
        before = _if(lane < cute.arch.block_idx()[0], of_ctas)
        before += _if(lane < warp, sums[base + lane])
        ranked = _if(lane < self.ctas, counts[base + LANES + lane])
        return warp_sum(of_ctas), warp_sum(before), cute.arch.warp_redux_sync(ranked, "add")

    @cute.jit
    def _tell(self, tensor: Any, barrier: Any, first: Any, value: Any) -> None:
        """This CTA's number to all, by one warp."""
        place = tensor.iterator + first + cute.arch.block_idx()[0]
        lane = cute.arch.lane_idx()
        if lane < self.ctas:
            _push(Int32(place.toint()), Int32(barrier.toint()), lane, value)

    @cute.jit
    def announce(self, shared: Any, chosen: Uint32, value: Uint32) -> None:
        """A token and the bits of its logit to all, by the one warp that knows."""
        barriers, _, _, _, choice = shared
        lane = cute.arch.lane_idx()
        both = Uint64(value) << Uint64(32) | Uint64(chosen)
        if lane < self.ctas:
            barrier = barriers.iterator + _CHOICE
            _push(Int32(choice.iterator.toint()), Int32(barrier.toint()), lane, both)

    @cute.jit
    def announced(self, shared: Any, number: Int32) -> Any:
        """What was announced, the `number`-th time."""
        barriers, _, _, _, choice = shared
        barrier = barriers.iterator + _CHOICE
        if cute.arch.warp_idx() == 0:
            _expect(barrier, 8)
        cute.arch.mbarrier_wait(barrier, number % 2)
        both = choice[0]
        return Uint32(both & Uint64(0xFFFFFFFF)), Uint32(both >> Uint64(32))


@cute.jit
def _expect(barrier: Any, count: cutlass.Constexpr[int]) -> None:
    """Say that `count` bytes will come in this phase; by one warp."""
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, count)


@cute.jit
def _if(condition: Any, value: Any) -> Any:
    return value if condition else type(value)(0)


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
