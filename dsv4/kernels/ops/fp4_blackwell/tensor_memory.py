"""The order of a thread's operations on tensor memory, which the CTA's barriers do not keep."""

from __future__ import annotations

from dsv4.kernels.device.asm import effect


def before_thread_sync() -> None:
    """Those of this thread come before what a barrier makes others do."""
    effect("tcgen05.fence::before_thread_sync;")


def after_thread_sync() -> None:
    """Those of this thread come after what a barrier made it wait for."""
    effect("tcgen05.fence::after_thread_sync;")
