"""Which engine runs a store."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.serve.jobs import Engine
from dsv4.serve.one_at_a_time import OneAtATime

if TYPE_CHECKING:
    from dsv4.runtime.startup_clock import Mark


@dataclasses.dataclass(frozen=True)
class Wanted:
    """device: for `dsv4.load`. slots: sequences at a time. max_seq_len: tokens of one, None for
    the runtime's own. queue: most jobs that wait, None for four a slot.
    """

    device: str
    slots: int = 1
    max_seq_len: int | None = None
    queue: int | None = None


def make_engine(packed: PackedCheckpoint, wanted: Wanted, mark: Mark) -> Engine:
    """Load the weights of `packed` and run them. mark: called with the name of each phase when it
    ends. Raises StoreError, RuntimeRefusal or KernelError.
    """
    model = dsv4.load(packed, device=wanted.device, mark=mark)
    waiting = wanted.queue if wanted.queue is not None else 4 * wanted.slots
    return OneAtATime(model.session(max_seq_len=wanted.max_seq_len), waiting)
