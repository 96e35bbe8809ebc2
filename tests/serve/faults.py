"""Faults of what is remembered, planted in CPU and GPU alike: both use `SlotMemory`."""

from __future__ import annotations

import pytest
from torch import Tensor

from dsv4.runtime.snapshots import SlotMemory


def stale_ring_row(patch: pytest.MonkeyPatch) -> None:
    """A row of a ring stays what it was."""
    right = SlotMemory.load_state

    def wrong(self: SlotMemory, position: int, state: Tensor) -> None:
        ring = self._rings[0].rows
        before = ring[(position - 2) % len(ring)].clone()
        right(self, position, state)
        ring[(position - 2) % len(ring)] = before

    patch.setattr(SlotMemory, "load_state", wrong)


def state_one_token_off(patch: pytest.MonkeyPatch) -> None:
    """A state is that of the token before."""
    right = SlotMemory.save_state
    patch.setattr(
        SlotMemory, "save_state", lambda self, position, state: right(self, position - 1, state)
    )
