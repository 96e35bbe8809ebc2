"""A warp runs a program. Lanes that diverge go on at the lowest address."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.interpreter.arithmetic import LANES, Bits, compute, shift, signed
from tests.support.interpreter.blackwell import TensorMap
from tests.support.interpreter.hopper import Copy, multiply_pairs
from tests.support.interpreter.matrices import MatrixWarp
from tests.support.interpreter.memory import RANK, Barrier, Memory, Places
from tests.support.interpreter.source import Instruction, Operand

_IGNORED = {"griddepcontrol", "fence", "prefetch", "setmaxnreg"}


class Warp(MatrixWarp):
    """Its instructions, a method for each that is not plain arithmetic."""

    def waits(self) -> bool:
        """Whether the next instruction is a wait that is not over."""
        one = self.program[self.next]
        if one.op[0] not in ("mbarrier", "barrier"):
            return False
        if one.op[:3] == ("barrier", "cluster", "wait"):
            others = [warp for cta in self.cta.cluster for warp in cta.alive]
            return any(warp.arrivals < self.arrivals for warp in others)
        if one.op[:2] != ("mbarrier", "try_wait"):
            return False
        address, parity = self._wait_of(one)
        return self.cta.shared.barriers[address].phase == parity

    def _wait_of(self, one: Instruction) -> tuple[int, int]:
        lane = int(np.argmax(self.furthest_behind))
        return self._address(one.operands[1], lane), int(self.value(one.operands[2])[lane])

    def step(self) -> bool:
        """One instruction, of the lanes that are furthest behind; False when it has to wait."""
        if self.done or self.at_barrier or self.waits():
            return False
        pc, lanes = self.next, self.furthest_behind
        one = self.program[pc]
        active = lanes
        if one.guard:
            name, negated = one.guard
            active = lanes & ((self.registers[name] != 0) ^ negated)
        if one.op[0] == "bra":
            self.pcs[active] = one.target
            self.pcs[lanes & ~active] = pc + 1
            self.find()
            return True
        if one.op[0] == "ret":
            self.live[active] = False
            self.pcs[lanes] = pc + 1
            self.find()
            return True
        if one.op == ("bar", "sync"):
            assert lanes.sum() == LANES, "a barrier of the CTA in a branch of a warp"
            numbers = [int(self.value(operand)[0]) for operand in one.operands]
            self.barrier, self.wanted = (*numbers, 0)[:2]
            self.at_barrier = True
            return False
        if active is lanes or active.any():
            self._execute(one, active)
        self.go_to(pc + 1, lanes)
        return True

    def _execute(self, one: Instruction, active: Any) -> None:
        op, args = one.op, one.operands
        if op[0] in _IGNORED or op[:2] in (("tcgen05", "fence::before_thread_sync"),):
            return
        special = getattr(self, f"_{op[0]}", None)
        if special is not None:
            special(one, active)
            return
        if op == ("mul", "rn", "bf16x2"):
            result: Bits | None = multiply_pairs(self.value(args[1]), self.value(args[2]))
        elif op[0] in ("shl", "shr"):
            result = shift(op, self.value(args[1]), self.value(args[2]))
        else:
            result = compute(op, [self.value(a) for a in args[1:]])
        if result is None:
            raise NotImplementedError(one.text)
        self.assign(args[0], result, active)

    def _mov(self, one: Instruction, active: Any) -> None:
        target, source = one.operands
        if target[0] == "v":
            width = int(one.op[-1][1:]) // len(target[1])
            for i, part in enumerate(target[1]):
                piece = self.value(source) >> np.uint64(i * width)
                self.assign(part, piece & np.uint64((1 << width) - 1), active)
        elif source[0] == "v":
            width = int(one.op[-1][1:]) // len(source[1])
            whole = np.zeros(LANES, dtype=np.uint64)
            for i, part in enumerate(source[1]):
                piece = self.value(part) & np.uint64((1 << width) - 1)
                whole |= piece << np.uint64(i * width)
            self.assign(target, whole, active)
        else:
            width = 1 if one.op[-1] == "pred" else int(one.op[-1][1:])
            mask = np.uint64((1 << width) - 1)
            self.assign(target, self.value(source) & mask, active)

    def _cvta(self, one: Instruction, active: Any) -> None:
        self.assign(one.operands[0], self.value(one.operands[1]), active)

    def _transfer(self, one: Instruction, place: Operand, active: Any) -> tuple[int, int, Places]:
        """Bytes of an element, elements, and the addresses of the active lanes."""
        width = int(one.op[-1][1:]) // 8
        count = int(one.op[-2][1:]) if one.op[-2] in ("v2", "v4") else 1
        addresses = self.value(place[1])[active].astype(np.int64) + place[2]
        assert not (addresses % (width * count)).any(), f"{one.text} at {addresses}"
        return width, count, addresses

    def _space(self, one: Instruction) -> Memory:
        if one.op[1] == "shared::cluster":
            return self.cta.others
        return self.cta.shared if one.op[1].startswith("shared") else self.cta.memory

    def _ld(self, one: Instruction, active: Any) -> None:
        target, source = one.operands
        if one.op[1] == "param":
            _, raw = self.cta.parameters[source[1][1]]
            width = int(one.op[-1][1:]) // 8
            for i, part in enumerate(target[1] if target[0] == "v" else [target]):
                at = source[2] + width * i
                number = int.from_bytes(raw[at : at + width], "little")
                self.assign(part, np.full(LANES, number, dtype=np.uint64), active)
            return
        width, count, addresses = self._transfer(one, source, active)
        wide = np.zeros((len(addresses), count, 8), dtype=np.uint8)
        read = self._space(one).read(addresses, width * count)
        wide[:, :, :width] = read.reshape(-1, count, width)
        found = np.zeros((count, LANES), dtype=np.uint64)
        found[:, active] = wide.view(np.uint64)[:, :, 0].T
        for part, value in zip(target[1] if target[0] == "v" else [target], found, strict=True):
            self.assign(part, value, active)

    def _st(self, one: Instruction, active: Any) -> None:
        if one.op[1] == "async":
            self._st_async(one, active)
            return
        target, source = one.operands
        width, count, addresses = self._transfer(one, target, active)
        values = [self.value(p) for p in (source[1] if source[0] == "v" else [source])]
        raw = np.stack([value[active] for value in values], 1)[:, :, None].view(np.uint8)
        data = raw[:, :, :width].reshape(-1, width * count)
        self._space(one).write(addresses, data)

    def _st_async(self, one: Instruction, active: Any) -> None:
        """A number to a CTA of the cluster, some time."""
        target, source, barrier = one.operands
        width = int(one.op[-1][1:]) // 8
        for lane in map(int, np.flatnonzero(active)):
            rank, place = divmod(self._address(target, lane), RANK)
            other, bar = divmod(self._address(barrier, lane), RANK)
            assert other == rank and place % width == 0, one.text
            number = int(self.value(source)[lane]) & ((1 << (8 * width)) - 1)
            receiver = self.cta.cluster[rank - 1]
            assert receiver.alive, "shared memory of a CTA that has ended"
            receiver.device.receive(place, number.to_bytes(width, "little"), bar)

    def _atom(self, one: Instruction, active: Any) -> None:
        assert one.op[1] == "global" and one.op[-2:] == ("add", "u32"), one.text
        old = np.zeros(LANES, dtype=np.uint64)
        for lane in map(int, np.flatnonzero(active)):
            place = self.cta.memory.view(self._address(one.operands[1], lane), 4).view(np.uint32)
            old[lane] = place[0]
            place[0] += np.uint32(self.value(one.operands[2])[lane])
        self.assign(one.operands[0], old, active)

    def _red(self, one: Instruction, active: Any) -> None:
        assert one.op == ("red", "shared", "add", "u32"), one.text
        for lane in map(int, np.flatnonzero(active)):
            word = self.cta.shared.view(self._address(one.operands[0], lane), 4).view(np.uint32)
            word += np.uint32(self.value(one.operands[1])[lane])

    def _bar(self, one: Instruction, active: Any) -> None:
        assert one.op == ("bar", "warp", "sync"), one.text
        self._all(active)

    def _elect(self, one: Instruction, active: Any) -> None:
        self._all(active)
        _, register, predicate = one.operands[0]
        self.assign(("r", register), np.zeros(LANES, dtype=np.uint64), active)
        self.assign(("r", predicate), (np.arange(LANES) == 0).astype(np.uint64), active)

    def _redux(self, one: Instruction, active: Any) -> None:
        self._all(active)
        assert one.op[:2] == ("redux", "sync"), one.text
        value = self.value(one.operands[1]) & np.uint64(0xFFFFFFFF)
        joins: dict[str, Any] = {"add": np.add, "or": np.bitwise_or}
        if one.op[2] in joins:
            joined = joins[one.op[2]].reduce(value) & np.uint64(0xFFFFFFFF)
            self.assign(one.operands[0], np.full(LANES, joined), active)
            return
        order = signed(value, 32) if one.op[3] == "s32" else value.view(np.int64)
        best = value[order.argmax() if one.op[2] == "max" else order.argmin()]
        self.assign(one.operands[0], np.full(LANES, best), active)

    def _shfl(self, one: Instruction, active: Any) -> None:
        self._all(active)
        target, source, by = one.operands[:3]
        lanes, value = np.arange(LANES), self.value(source)
        step = self.value(by).astype(np.int64)
        other = {"idx": step % LANES, "up": lanes - step, "bfly": lanes ^ step}[one.op[2]]
        other = np.where((other >= 0) & (other < LANES), other, lanes)
        self.assign(target, value[other], active)

    def _mbarrier(self, one: Instruction, active: Any) -> None:
        barriers, args = self.cta.shared.barriers, one.operands
        if one.op[1] == "init":
            lane = self._one(active)
            count = int(self.value(args[1])[lane])
            barriers[self._address(args[0], lane)] = Barrier(count, count)
        elif one.op[1] == "try_wait":
            self.assign(args[0], np.ones(LANES, dtype=np.uint64), active)
        else:
            for lane in map(int, np.flatnonzero(active)):
                own = barriers[self._address(args[1], lane)]
                number = int(self.value(args[2])[lane])
                if one.op[2] == "expect_tx":
                    own.bytes += number
                    number = 1
                own.arrive(number)

    def _barrier(self, one: Instruction, active: Any) -> None:
        self._all(active)
        self.arrivals += one.op[2] == "arrive"

    def _mapa(self, one: Instruction, active: Any) -> None:
        target, address, rank = one.operands
        self.assign(
            target,
            self.value(address) + (self.value(rank) + np.uint64(1)) * np.uint64(RANK),
            active,
        )

    def _vote(self, one: Instruction, active: Any) -> None:
        self._all(active)
        assert one.op == ("vote", "sync", "ballot", "b32"), one.text
        votes = sum(1 << lane for lane in map(int, np.flatnonzero(self.value(one.operands[1]))))
        self.assign(one.operands[0], np.full(LANES, votes, dtype=np.uint64), active)

    def _cp_async(self, one: Instruction, active: Any) -> None:
        if one.op[2] == "commit_group":
            self.copies.commit()
        elif one.op[2] == "mbarrier":
            self._arrive_after_copies(one, active)
        elif one.op[2] == "wait_group":
            self.copies.wait(int(self.value(one.operands[0])[0]))
        else:
            count = int(self.value(one.operands[2])[0])
            assert one.op[2] == "ca" or count == 16, one.text
            read = self.value(one.operands[3] if len(one.operands) > 3 else one.operands[2])
            for lane in map(int, np.flatnonzero(active)):
                target, source = (self._address(one.operands[i], lane) for i in (0, 1))
                assert target % count == 0 and source % count == 0, one.text
                found = np.zeros(0, dtype=np.uint8)
                if read[lane]:
                    found = self.cta.memory.view(source, int(read[lane]))
                self.copies.open.append(Copy(self.cta.shared.view(target, count), found))

    def _arrive_after_copies(self, one: Instruction, active: Any) -> None:
        assert one.op[3:5] == ("arrive", "noinc"), one.text
        places = [self._address(one.operands[0], int(lane)) for lane in np.flatnonzero(active)]
        before, barriers = self.copies.under_way(), self.cta.shared.barriers

        def done() -> None:
            for copy in before:
                copy.run()
            for place in places:
                barriers[place].arrive()

        self.cta.device.copies.append(done)

    def _cp(self, one: Instruction, active: Any) -> None:
        if one.op[2] != "bulk":
            self._cp_async(one, active)
            return
        lane, args, device = self._one(active), one.operands, self.cta.device
        target, barrier = self._address(args[0], lane), args[2 if "tensor" in one.op else 3]
        bar = self._address(barrier, lane)
        if "tensor" in one.op:
            place = int(self.value(args[1][1])[lane])
            raw = next(raw for base, raw in self.cta.parameters.values() if base == place)
            at = tuple(int(np.int32(np.uint32(self.value(c)[lane]))) for c in args[1][3][1])
            device.copy_tensor(target, TensorMap.decode(raw), at, bar)
        else:
            count = int(self.value(args[2])[lane])
            device.copy_bulk(target, self._address(args[1], lane), count, bar)

    def _tcgen05(self, one: Instruction, active: Any) -> None:
        device, args = self.cta.device, one.operands
        match one.op[1]:
            case "alloc":
                self._all(active)
                device.allocated = int(self.value(args[1])[0])
                self.cta.shared.view(self._address(args[0], 0), 4)[:] = 0
            case "dealloc":
                self._all(active)
                assert int(self.value(args[1])[0]) == device.allocated
                device.allocated = 0
            case "ld":
                self._take(one, active)
            case "cp":
                lane = self._one(active)
                descriptor = int(self.value(args[1])[lane])
                device.copy_scales(self._address(args[0], lane), descriptor)
            case "commit":
                lane = self._one(active)
                device.commit(self._address(args[0], lane))
            case "mma":
                lane = self._one(active)
                a, b, instruction, add = (int(self.value(args[i])[lane]) for i in (1, 2, 3, 6))
                scales = self._address(args[4], lane), self._address(args[5], lane)
                acc = self._address(args[0], lane)
                device.multiply(acc, a, b, instruction, scales, bool(add))
            case "wait::ld" | "relinquish_alloc_permit" | "fence::after_thread_sync":
                pass
            case _:
                raise NotImplementedError(one.text)

    def _take(self, one: Instruction, active: Any) -> None:
        """tcgen05.ld.32x32b: a lane's consecutive columns."""
        self._all(active)
        place = self._address(one.operands[1], 0)
        first, column = place >> 16, place & 0xFFFF
        own = int(self.registers["%tid.x"][0]) // LANES % 4 * LANES
        assert first == own, "a warp reads its own quarter of the lanes"
        for i, target in enumerate(one.operands[0][1]):
            words = self.cta.device.tensor[first : first + LANES, column + i]
            self.assign(target, words.astype(np.uint64), active)
