"""A small model whose caches fill within a few dozen tokens: blocks of 16."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from dsv4.runtime.model import Model, load
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.jobs import TokenLogprob
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import TRANSFORMERS_TINY, random_ids, random_weights

CONFIG = dataclasses.replace(
    TRANSFORMERS_TINY,
    compress_ratios=(16, 4),
    n_routed_experts=2,
    num_experts_per_tok=1,
    hc_sinkhorn_iters=1,
)
BLOCK = 16
IDS = random_ids(CONFIG, 400, seed=3).tolist()


@functools.cache
def model() -> Model:
    torch.set_num_threads(1)
    return load(InMemoryWeights(CONFIG, random_weights(CONFIG)))


def backend(slots: int, max_seq_len: int = 512) -> CpuBackend:
    return CpuBackend(model(), slots, max_seq_len, block=BLOCK)


def alone(
    ids: Sequence[int], count: int, sampler: dict[str, Any]
) -> tuple[list[int], list[TokenLogprob]]:
    """What a session of its own answers, and the probabilities of its tokens, as torch has them."""
    tokens, told = _alone(tuple(ids), max(count, 20), tuple(sampler.items()))
    return tokens[:count], told[:count]


@functools.cache
def _alone(
    ids: tuple[int, ...], count: int, parameters: tuple[tuple[str, Any], ...]
) -> tuple[list[int], list[TokenLogprob]]:
    session, sampler = model().session(512), Sampler(**dict(parameters))
    sampler.begin(ids)
    tokens: list[int] = []
    told: list[TokenLogprob] = []
    following = torch.tensor(ids)
    for _ in range(count):
        logits = session.forward(following, "last")
        following = sampler(logits)
        token = int(following)
        sampler.took(token)
        tokens.append(token)
        every = logits[0].double() - logits[0].double().logsumexp(0)
        best = every.argsort(descending=True, stable=True)[:2].tolist()
        top = tuple((one, float(every[one])) for one in best)
        told.append(TokenLogprob(token, float(every[token]), top))
    return tokens, told
