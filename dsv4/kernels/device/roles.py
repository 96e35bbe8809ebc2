"""Two kinds of CTAs in one launch: workers make parts of sums, finishers add and use them.

Workers come first in the grid and wait for nobody, so that the launch ends even where not all of
its CTAs fit on the device at once. They take tokens by groups: up to `MAX_SLICES` groups are worked
on at once, each by all parts of the work, and then the next ones. A finisher takes a token, and
every `MAX_FINISHERS`-th after it. What a worker has for a finisher goes through a mailbox
(mailbox.py): float32 words, zero before and after the launch.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute

GROUP = 8  # tokens that a worker takes at once: the columns of an MMA
MAX_SLICES = 8
MAX_FINISHERS = 128
WORKER_BARRIER = 1  # of a worker's warps, whose sums it adds
FINISHER_BARRIER = 2  # of a finisher's, once it has the workers' sums of a token


class Roles:
    """workers: CTAs that share the work of a group. pdl: the launch may begin before the last ends.

    tokens: of the launch, in all that follows.
    """

    def __init__(self, workers: int, pdl: bool) -> None:
        self.workers, self.pdl = workers, pdl

    def ctas(self, tokens: Int32) -> Int32:
        """Of the grid."""
        return self.workers * self.slices(tokens) + cutlass.min(tokens, MAX_FINISHERS)

    def groups(self, tokens: Int32) -> Int32:
        """Groups of tokens, the last one perhaps not full."""
        return (tokens + GROUP - 1) // GROUP

    def slices(self, tokens: Int32) -> Int32:
        """Groups that are worked on at once."""
        return cutlass.min(self.groups(tokens), MAX_SLICES)

    def finisher(self, block: Int32, slices: Int32) -> Int32:
        """A CTA's number among the finishers, negative for a worker."""
        return block - self.workers * slices

    def begin(self) -> None:
        """Let the next launch begin: its CTAs fill up what this one leaves free.

        They ask for weights, which no launch writes, before they wait for this one.
        """
        if self.pdl:
            cute.arch.griddepcontrol_launch_dependents()

    def wait(self) -> None:
        """For the launches before; weights may be read without."""
        if self.pdl:
            cute.arch.griddepcontrol_wait()
