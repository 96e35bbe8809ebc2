"""What an engine has done and does: for metrics."""

from __future__ import annotations

import dataclasses

from dsv4.serve.jobs import Finish


@dataclasses.dataclass(frozen=True)
class Stats:
    """Now: slots in all; running: jobs that have a slot, of which `reading` read their prompt;
    waiting: jobs without one; kept: slots that hold an ended sequence; remembered_bytes: host
    memory that beginnings of sequences take, in `remembered_blocks`.

    Since the start: tokens of prompts, of which cached_tokens were not computed; tokens that were
    told; jobs by how they ended; steps, and their rows; seconds that jobs waited for their first
    chunk, from there to their first token, and from there to their end, summed over jobs.
    """

    slots: int = 0
    running: int = 0
    reading: int = 0
    waiting: int = 0
    kept: int = 0
    remembered_blocks: int = 0
    remembered_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[Finish, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
