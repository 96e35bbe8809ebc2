"""Temporary: knock-outs to see what costs what."""
from typing import Any
import cutlass
import cutlass.cute as cute
from dsv4.kernels.sm90 import experts, expert_stream, raw
from dsv4.kernels.sm90.experts import Experts
from dsv4.kernels.sm90.operands import Nvfp4Operand
class NoCompute(Experts):
    @cute.jit
    def _multiply(self, acc: Any, first: int, words: Any, x: Any) -> None:
        pass
    @cute.jit
    def _multiply_fp8(self, acc: Any, first: int, words: Any, x: Any, scales: Any) -> None:
        pass
class NoMemory(Experts):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        raw.copy_weights = lambda *a: None
class NoBarrier(Experts):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        experts.arrive_and_wait = lambda counters, ctas: None
class OldDecode(Experts):
    def __init__(self, hidden, inter, *a, **k):
        super().__init__(hidden, inter, *a, **k)
        self.nvfp4 = Nvfp4Operand(hidden, inter, 8)
def _hint(h):
    from cutlass.cutlass_dsl import dsl_user_op
    @dsl_user_op
    def copy_weights(slot, at, address, offset, *, loc=None, ip=None):
        raw._effect(f"cp.async.cg.shared.global{h} [$0 + {at}], [$1 + {offset}], 16;", "r,l", [slot, address], loc, ip)
    return copy_weights
class Hint128(Experts):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        raw.copy_weights = _hint(".L2::128B")
class Hint0(Experts):
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        raw.copy_weights = _hint("")
