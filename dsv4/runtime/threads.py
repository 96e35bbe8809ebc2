"""How many threads torch takes on the CPU: by the work of a token.

A step of a small model is thousands of short operations, and each of them waits for all threads.
On two cores that others use, the small trained model (5 MB read a token) made 0.1 times the tokens
with two threads that it made with one: a thread that waits spins, and takes the core from the one
it waits for. Sleeping instead, two threads come to 0.5 to 1.0 of one; large models gain by them.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.formats.store.reader import PackedStore

THREADS = "OMP_NUM_THREADS"
WAITING = "OMP_WAIT_POLICY"
SMALL_STEP = 64 << 20
"""Bytes of weights read for a token, below which one thread does it."""


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep while they wait. To be called before torch is imported."""
    environment.setdefault(WAITING, "PASSIVE")


def choose_threads(store: PackedStore) -> None:
    """Set torch's threads for a token's work; nothing where the user has set OMP_NUM_THREADS."""
    import torch

    if THREADS not in os.environ and step_nbytes(store) < SMALL_STEP:
        torch.set_num_threads(1)


def step_nbytes(store: PackedStore) -> int:
    """Bytes of weights that one token reads: all but embeddings, draft layers, and most experts."""
    config = store.config
    core = experts = 0
    for path, spec in store.hierarchy.arrays.items():
        if path.startswith(("mtp/", "embed/")):
            continue
        if "/experts/" in path:
            experts += spec.nbytes
        else:
            core += spec.nbytes
    return core + experts * config.num_experts_per_tok // config.n_routed_experts
