"""A model with one layer of each kind, for tests that validate a store hundreds of times."""

from __future__ import annotations

import dataclasses

from dsv4.synthetic.tiny import TINY

SMALL = dataclasses.replace(
    TINY,
    vocab_size=512,
    num_hidden_layers=2,
    num_hash_layers=1,
    compress_ratios=(0, 4),
    n_routed_experts=4,
    num_draft_layers=0,
)
