"""Barriers in shared memory that asynchronous copies arrive at.

A barrier takes 8 bytes at a byte address. A phase is complete when all expected threads have
arrived; phases alternate between parity 0 and 1. Who waits sees what was copied.
"""

from __future__ import annotations

from cutlass import Int32

from dsv4.kernels.device.asm import effect


def init(barrier: Int32, arrivals: int) -> None:
    """A barrier for that many arrivals a phase; the CTA meets before it is used."""
    effect(f"mbarrier.init.shared.b64 [$0], {arrivals};", barrier)


def arrive_after_copies(barrier: Int32) -> None:
    """This thread's arrival, once all copies that it asked for have come."""
    effect("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", barrier)


def wait(barrier: Int32, parity: Int32) -> None:
    """Until the phase of that parity is complete."""
    effect(
        "{ .reg .pred p; WAIT_${:uid}: "
        "mbarrier.try_wait.parity.shared.b64 p, [$0], $1, 10000000; @!p bra WAIT_${:uid}; }",
        barrier,
        parity,
    )
