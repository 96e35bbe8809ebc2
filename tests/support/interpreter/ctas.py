"""A CTA of warps that run a program, and a cluster of CTAs."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.interpreter.arithmetic import LANES
from tests.support.interpreter.blackwell import Device
from tests.support.interpreter.memory import RANK, Bytes, GlobalMemory, Memory, SharedMemory
from tests.support.interpreter.source import Program
from tests.support.interpreter.warps import Warp

_MOST_STEPS = 3_000_000
_PARAMETERS = 1 << 60  # where parameters have their addresses


class ClusterMemory(Memory):
    """Shared memory of all CTAs of a cluster, at addresses that `mapa` made."""

    def __init__(self, cta: Cta) -> None:
        self.cta = cta

    def view(self, address: int, count: int) -> Bytes:
        """`count` bytes of one of the CTAs, which must not have ended."""
        rank, place = divmod(address, RANK)
        owner = self.cta.cluster[rank - 1]
        assert owner.alive, "shared memory of a CTA that has ended"
        return owner.shared.view(place, count)


class Cta:
    """One CTA; parameters: bytes of each, in order."""

    def __init__(
        self,
        program: Program,
        parameters: Sequence[bytes],
        memory: GlobalMemory,
        block: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        seed: int,
        grid: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        self.program, self.memory, self.block, self.grid = program, memory, block, grid
        self.shared = SharedMemory(shared_bytes)
        self.device = Device(memory, self.shared, seed)
        self.parameters = {
            name: (_PARAMETERS + 4096 * i, raw)
            for i, (name, raw) in enumerate(zip(program.parameters, parameters, strict=True))
        }
        self.warps = [Warp(self, first) for first in range(0, threads, LANES)]
        draw = self.device.random  # some are much slower than others, which ones differs
        self.eagerness = draw.choice((0.1, 0.7, 0.98))
        self.cluster: Sequence[Cta] = [self]
        self.others = ClusterMemory(self)
        for warp in self.warps:
            warp.speed = draw.choice((0.02, 1.0))

    @property
    def alive(self) -> list[Warp]:
        """Warps that have not ended."""
        return [warp for warp in self.warps if not warp.done]


def run(ctas: Sequence[Cta]) -> None:
    """A cluster, to the end of all warps. Raises RuntimeError when they wait for ever."""
    draw, eagerness = ctas[0].device.random, ctas[0].eagerness
    for cta in ctas:
        cta.cluster = ctas
    for _ in range(_MOST_STEPS):
        alive = [warp for cta in ctas for warp in cta.alive]
        if not alive:
            assert not any(cta.device.allocated for cta in ctas), "tensor memory was not given back"
            return
        for cta in ctas:
            _meet(cta.alive)
        ready = [warp for warp in alive if not warp.at_barrier and not warp.waits()]
        if ready and draw.random() < eagerness:
            (warp,) = draw.choices(ready, [warp.speed for warp in ready])
            for _ in range(draw.randrange(1, 60)):
                if not warp.step():
                    break
        elif not any(cta.device.progress() for cta in draw.sample(ctas, len(ctas))) and not ready:
            where = [warp.program[warp.next].text for warp in alive]
            raise RuntimeError(f"all warps wait for ever: {where}")
    raise RuntimeError("the kernel does not end")


def _meet(alive: Sequence[Warp]) -> None:
    """Let warps go on whose barrier has all the threads that it wants."""
    for number in {warp.barrier for warp in alive if warp.at_barrier}:
        there = [warp for warp in alive if warp.at_barrier and warp.barrier == number]
        wanted = {warp.wanted or LANES * len(alive) for warp in there}
        if wanted == {LANES * len(there)}:
            for warp in there:
                warp.at_barrier = False
                warp.go_to(warp.next + 1, warp.live)
