"""32 lanes: their registers, and what a CTA is to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.interpreter.arithmetic import LANES, Bits
from tests.support.interpreter.hopper import Copies, Products
from tests.support.interpreter.memory import SHARED_BASE
from tests.support.interpreter.source import Operand

if TYPE_CHECKING:
    from tests.support.interpreter.ctas import Cta


class Lanes:
    """A warp's state. barrier, wanted: number and threads of that which it is at; 0: of all."""

    def __init__(self, cta: Cta, first_thread: int) -> None:
        self.cta, self.program = cta, cta.program.instructions
        self.registers: dict[str, Bits] = {
            "%tid.x": np.arange(first_thread, first_thread + LANES, dtype=np.uint64),
            "%laneid": np.arange(LANES, dtype=np.uint64),
        }
        for axis, value, count in zip("xyz", cta.block, cta.grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(LANES, value, dtype=np.uint64)
            self.registers[f"%nctaid.{axis}"] = np.full(LANES, count, dtype=np.uint64)
        self.pcs = np.zeros(LANES, dtype=np.int64)
        self.live = np.ones(LANES, dtype=np.bool_)
        self.next = 0  # lowest address of a live lane; -1: there is none
        self.abreast = True  # all lanes are live and there
        self.at_barrier = False
        self.barrier = self.wanted = self.arrivals = 0
        self.speed = 1.0
        self.copies = Copies()
        self.products = Products()

    @property
    def done(self) -> bool:
        """Whether all lanes have returned."""
        return self.next < 0

    def go_to(self, places: Any, lanes: Any) -> None:
        """Where some or all lanes go on."""
        if self.abreast and lanes is self.live and isinstance(places, int):
            self.pcs.fill(places)
            self.next = places
            return
        self.pcs[lanes] = places
        self.find()

    def find(self) -> None:
        """Look again where the lanes are."""
        there = self.pcs[self.live]
        self.next = int(there.min()) if len(there) else -1
        self.abreast = len(there) == LANES and int(there.max()) == self.next

    @property
    def furthest_behind(self) -> Any:
        """The lanes that run next."""
        return self.live if self.abreast else self.live & (self.pcs == self.next)

    def value(self, operand: Operand) -> Bits:
        """An operand's bits in all lanes."""
        match operand:
            case ("r", name):
                return self.registers[name]
            case ("i", number):
                return np.full(LANES, number & ((1 << 64) - 1), dtype=np.uint64)
            case ("s", "__dynamic_shmem__0"):
                return np.full(LANES, SHARED_BASE, dtype=np.uint64)
            case ("s", name):
                return np.full(LANES, self.cta.parameters[name][0], dtype=np.uint64)
        raise NotImplementedError(str(operand))

    def assign(self, operand: Operand, value: Bits, active: Any) -> None:
        """Write a register in the active lanes."""
        if operand[0] == "_":
            return
        assert operand[0] == "r", operand
        old = self.registers.get(operand[1])
        if old is None:
            old = np.zeros(LANES, dtype=np.uint64)
        self.registers[operand[1]] = np.where(active, value, old)

    def _address(self, operand: Operand, lane: int) -> int:
        return int(self.value(operand[1])[lane]) + int(operand[2])

    def _all(self, active: Any) -> None:
        assert active.sum() == LANES, "an operation of a whole warp in a branch of it"

    def _one(self, active: Any) -> int:
        assert active.sum() == 1, "an operation of one thread run by several"
        return int(np.flatnonzero(active)[0])
