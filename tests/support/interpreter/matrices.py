"""What a warp does with small matrices of bfloat16: moves of 8 by 8, and products."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.interpreter.arithmetic import LANES
from tests.support.interpreter.hopper import (
    add_product,
    gather,
    multiply,
    operand,
    rows_of,
    transpose,
)
from tests.support.interpreter.lanes import Lanes
from tests.support.interpreter.source import Instruction


class MatrixWarp(Lanes):
    """A method for each instruction."""

    def _movmatrix(self, one: Instruction, active: Any) -> None:
        self._all(active)
        self.assign(one.operands[0], transpose(self.value(one.operands[1])), active)

    def _stmatrix(self, one: Instruction, active: Any) -> None:
        self._all(active)
        assert one.op[3:] == ("m8n8", "x4", "trans", "shared", "b16"), one.text
        for matrix, part in enumerate(one.operands[1][1]):
            columns = transpose(self.value(part)).astype(np.uint32).reshape(8, 4)
            for column, words in enumerate(columns):
                address = self._address(one.operands[0], 8 * matrix + column)
                assert address % 16 == 0, one.text
                self.cta.shared.view(address, 16)[:] = words.view(np.uint8)

    def _ldmatrix(self, one: Instruction, active: Any) -> None:
        self._all(active)
        turned = "trans" in one.op
        assert one.op[1:4] == ("sync", "aligned", "m8n8") and one.op[-2] == "shared", one.text
        for matrix, part in enumerate(one.operands[0][1]):
            places = [self._address(one.operands[1], 8 * matrix + row) for row in range(8)]
            assert not any(place % 16 for place in places), one.text
            rows = np.stack([self.cta.shared.view(place, 16) for place in places])
            words = rows.view(np.uint32).reshape(LANES).astype(np.uint64)
            self.assign(part, transpose(words) if turned else words, active)

    def _mma(self, one: Instruction, active: Any) -> None:
        self._all(active)
        assert "m16n8k16" in one.op and one.op[-4:] == ("f32", "bf16", "bf16", "f32"), one.text
        a, b, c = ([self.value(part) for part in operand[1]] for operand in one.operands[1:])
        for target, value in zip(one.operands[0][1], multiply(a, b, c), strict=True):
            self.assign(target, value, active)

    def _wgmma(self, one: Instruction, active: Any) -> None:
        self._all(active)
        match one.op[1]:
            case "fence":
                pass
            case "commit_group":
                self.products.commit()
            case "wait_group":
                self.products.wait(int(self.value(one.operands[0])[0]))
            case _:
                assert one.op[-3:] == ("f32", "bf16", "bf16"), one.text
                self.products.open.append(lambda: self._product(one, active))

    def _product(self, one: Instruction, active: Any) -> None:
        """A warp's 16 rows of `acc + a · b`; operands are read now."""
        acc, a, b, *flags = one.operands
        data = self.cta.shared.data
        n = 2 * len(acc[1])
        assert f"m64n{n}k16" in one.op, one.text
        if a[0] == "v":
            left = rows_of([self.value(part) for part in a[1]])
        else:
            warp = int(self.registers["%tid.x"][0]) // LANES % 4
            rows = 16 * warp + np.arange(16)
            left = gather(data, operand(int(self.value(a)[0]), rows, flags[3] == ("i", 1)))
        places = operand(int(self.value(b)[0]), np.arange(n), flags[-1] == ("i", 1))
        right = gather(data, places)
        assert self.value(flags[0])[0] and flags[1] == flags[2] == ("i", 1), one.text
        sums = add_product([self.value(part) for part in acc[1]], left, right)
        for target, value in zip(acc[1], sums, strict=True):
            self.assign(target, value, active)
