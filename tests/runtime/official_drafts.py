"""What DeepSeek's own code proposes for the small models here, and how a session compares with it.

`goldens/dspark.safetensors`: inference/model.py of DeepSeek-V4-Flash-0731, `forward_spec`;
`goldens/mtp.safetensors`: that of the preview, its MTP block chained to three proposals by what the
block leaves, as vLLM does it, the rows of keys of guesses put back. Both with kernels in plain
torch, weights `random_weights(config, 0, draft)`, in float32 throughout, after a prompt of six
tokens and then token by token. ids `[64]`: the sequence; position `[n]`: where a proposal begins;
proposed `[n, k]`, logits `[n, k, vocab]`, confidence `[n, k]`; weights_sum: of all weights.

Their sums are float32, ours float64. Over all 57 positions from 7 to 63 the largest difference was
8e-6, at logits of standard deviation 1.4; one rounding of a key to FP8 that falls on the other side
would give 1e-3, and none did. The least of the mistakes that are planted gives 0.09.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.model import Model, load
from dsv4.runtime.positions import RopeTable, RopeTables, Step
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import random_weights

TOLERANCE = 5e-5
MISTAKEN = 0.03

Mistake = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest, of all proposals. same: whether all ids are the same."""

    logits: float
    confidence: float
    same: bool


def official(kind: DraftKind) -> dict[str, Tensor]:
    """See the module."""
    return load_file(Path(__file__).parent / "goldens" / f"{kind}.safetensors")


def small_model(config: ModelConfig, kind: DraftKind) -> Model:
    """The model whose proposals the goldens hold."""
    weights = random_weights(config, 0, kind)
    total = sum(tensor.double().sum() for tensor in weights.values())
    assert torch.allclose(torch.as_tensor(total), official(kind)["weights_sum"], atol=1e-6), (
        "this torch draws other weights than the goldens were made with"
    )
    return load(InMemoryWeights(config, weights), numerics=Numerics.CACHES, draft=kind)


def compare(
    model: Model,
    golden: Mapping[str, Tensor],
    *,
    reading: Mistake | None = None,
    proposing: Mistake | None = None,
) -> Difference:
    """Feed the golden's sequence and propose where it does. reading, proposing: a mistake that is
    planted while tokens are fed, or while something is proposed.
    """
    ids, session = golden["ids"], model.session(len(golden["ids"]) + 8)
    differences = []
    for place, position in enumerate(golden["position"].tolist()):
        with _mistaken(reading):
            while session.position < position:
                session.forward(ids[session.position : session.position + 1])
        token = int(ids[position]) if position < len(ids) else 0
        with _mistaken(proposing):
            draft = session.propose(token, golden["proposed"].shape[1])
        confidence = 0.0
        if draft.confidence is not None:
            confidence = float((draft.confidence - golden["confidence"][place]).abs().max())
        differences.append(
            Difference(
                float((draft.logits - golden["logits"][place]).abs().max()),
                confidence,
                torch.equal(draft.ids, golden["proposed"][place]),
            )
        )
    return Difference(
        max(one.logits for one in differences),
        max(one.confidence for one in differences),
        all(one.same for one in differences),
    )


def later(table: RopeTable) -> RopeTable:
    """Every position has the rotation of the next one."""
    return RopeTable(table.cos[1:], table.sin[1:])


def later_step(step: Step) -> Step:
    """The same step, with the sliding layers' rotations of the next position."""
    tables = RopeTables(later(step.tables.sliding), step.tables.compressed)
    return Step(step.ids, step.position, step.window_idx.shape[1], tables)


@contextlib.contextmanager
def _mistaken(mistake: Mistake | None):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            mistake(patch)
        yield
