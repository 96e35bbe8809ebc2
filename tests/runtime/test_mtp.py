"""MTP proposes what DeepSeek's own code does, chained, and known mistakes in it show."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.rope import apply_rope
from dsv4.runtime import attention
from dsv4.runtime.cache import WindowCache
from dsv4.runtime.model import Model, load
from dsv4.runtime.mtp import Mtp
from dsv4.runtime.positions import Step
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.official_drafts import (
    MISTAKEN,
    TOLERANCE,
    compare,
    later,
    later_step,
    official,
    small_model,
)
from tests.runtime.small_models import MTP_SMALL, random_weights

CONFIG = MTP_SMALL
EPS = CONFIG.rms_norm_eps

last, propose, observe = WindowCache.last, Mtp.propose, Mtp.observe


@functools.cache
def model() -> Model:
    return small_model(CONFIG, DraftKind.MTP)


def test_proposals_are_those_of_the_official_code() -> None:
    found = compare(model(), official(DraftKind.MTP))
    assert found.same
    assert found.logits < TOLERANCE


def newest_row_missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        WindowCache,
        "last",
        lambda self, count, at: last(self, count, at)[: -1 if count > 1 else None],
    )


def row_one_position_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Mtp,
        "propose",
        lambda self, token, count, at, table, context: propose(
            self, token, count, at, later(table), context
        ),
    )


def no_inverse_rotation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        attention,
        "apply_rope",
        lambda x, cos, sin, inverse=False: x if inverse else apply_rope(x, cos, sin),
    )


def context_one_position_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Mtp,
        "observe",
        lambda self, tapped, step, context: observe(self, tapped, later_step(step), context),
    )


def context_of_the_tokens_themselves(patch: pytest.MonkeyPatch) -> None:
    """Rows mixed with another token than the one that follows."""

    def wrong(self: Mtp, tapped, step: Step, context) -> None:  # type: ignore[no-untyped-def]
        ids = (step.ids + 1) % CONFIG.vocab_size
        other = Step(ids, step.position, step.window_idx.shape[1], step.tables)
        observe(self, tapped, other, context)

    patch.setattr(Mtp, "observe", wrong)


def streams_normed_as_one(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Mtp, streams: Tensor, following: Tensor) -> Tensor:
        e = linear(rms_norm(self.embed[following], self.enorm, EPS), self.e_proj)
        flat = rms_norm(streams.flatten(1), torch.ones(streams[0].numel()), EPS)
        return e[:, None] + linear(flat.view(streams.shape) * self.hnorm, self.h_proj)

    patch.setattr(Mtp, "_mix", wrong)


def projections_exchanged(patch: pytest.MonkeyPatch) -> None:
    drafter = model().drafter
    assert isinstance(drafter, Mtp)
    e_proj, h_proj = drafter.e_proj, drafter.h_proj
    patch.setattr(drafter, "e_proj", h_proj)
    patch.setattr(drafter, "h_proj", e_proj)


@pytest.mark.parametrize(
    "mistake",
    [
        newest_row_missing,
        row_one_position_on,
        no_inverse_rotation,
        streams_normed_as_one,
        projections_exchanged,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_proposing_shows(mistake) -> None:  # type: ignore[no-untyped-def]
    assert compare(model(), official(DraftKind.MTP), proposing=mistake).logits > MISTAKEN


@pytest.mark.parametrize(
    "mistake",
    [
        context_one_position_on,
        context_of_the_tokens_themselves,
        streams_normed_as_one,
        projections_exchanged,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_reading_shows(mistake) -> None:  # type: ignore[no-untyped-def]
    assert compare(model(), official(DraftKind.MTP), reading=mistake).logits > MISTAKEN


def test_more_layers_than_one_are_refused() -> None:
    config = dataclasses.replace(CONFIG, num_draft_layers=2)
    with pytest.raises(RuntimeRefusal, match=r"2 MTP layers, expected 1; .*drafts=False"):
        load(InMemoryWeights(config, random_weights(CONFIG, 0, DraftKind.MTP)), draft=DraftKind.MTP)
