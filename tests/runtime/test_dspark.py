"""DSpark proposes what DeepSeek's own code does, and known mistakes in it show."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import DraftRefusal, RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.kernels.reference.attention import sparse_attention
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.rope import apply_rope
from dsv4.runtime import attention
from dsv4.runtime.attention import Attention
from dsv4.runtime.cache import WindowCache
from dsv4.runtime.draft import Draft
from dsv4.runtime.dspark import DSpark
from dsv4.runtime.model import Model, load
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
from tests.runtime.small_models import DSPARK_SMALL, random_ids, random_weights

Keys = Callable[[Tensor, Tensor, Tensor], Tensor]
CONFIG = DSPARK_SMALL
BLOCK = CONFIG.dspark_block_size or 0
MARKOV, CONFIDENCE = "mtp.2.markov_head.markov_w", "mtp.2.confidence_head.proj.weight"

last, propose, observe, follow = WindowCache.last, DSpark.propose, DSpark.observe, DSpark._follow


@functools.cache
def model() -> Model:
    return small_model(CONFIG, DraftKind.DSPARK)


def test_proposals_are_those_of_the_official_code() -> None:
    found = compare(model(), official(DraftKind.DSPARK))
    assert found.same
    assert found.logits < TOLERANCE
    assert found.confidence < TOLERANCE


def newest_row_missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowCache, "last", lambda self, count, at: last(self, count, at)[:-1])


def window_less_the_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowCache, "last", lambda self, count, at: last(self, count - BLOCK, at))


def block_one_position_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        DSpark,
        "propose",
        lambda self, token, count, at, table, context: propose(
            self, token, count, at, later(table), context
        ),
    )


def context_one_position_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        DSpark,
        "observe",
        lambda self, tapped, step, context: observe(self, tapped, later_step(step), context),
    )


def no_inverse_rotation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        attention,
        "apply_rope",
        lambda x, cos, sin, inverse=False: x if inverse else apply_rope(x, cos, sin),
    )


def taps_reversed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        DSpark,
        "observe",
        lambda self, tapped, step, context: observe(self, tapped[::-1], step, context),
    )


def norm_of_attention_on_the_context(patch: pytest.MonkeyPatch) -> None:
    drafter = model().drafter
    assert isinstance(drafter, DSpark)
    for stage in drafter.stages:
        right, norm = stage.attn.keys, stage.attn_hc.norm

        def keys(*at: Tensor, right: Keys = right, norm: Tensor = norm) -> Tensor:
            return right(rms_norm(at[0], norm, CONFIG.rms_norm_eps), *at[1:])

        patch.setattr(stage.attn, "keys", keys)


def bias_of_the_current_token(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: DSpark, token: Tensor, collapsed: Tensor, logits: Tensor) -> Draft:
        current = self.markov_w1[logits.argmax(-1)].float()
        logits = logits + linear(current, self.markov_w2, dtype=torch.float32)
        confidence = linear(torch.cat((collapsed, current), -1), self.confidence)[:, 0]
        return Draft(logits.argmax(-1), logits, confidence)

    patch.setattr(DSpark, "_follow", wrong)


def confidence_after_the_norm(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: DSpark, token: Tensor, collapsed: Tensor, logits: Tensor) -> Draft:
        normed = rms_norm(collapsed, self.head.norm, CONFIG.rms_norm_eps)
        return follow(self, token, normed, logits)

    patch.setattr(DSpark, "_follow", wrong)


def block_rows_in_order(patch: pytest.MonkeyPatch) -> None:
    """A causal mask among the rows of a block."""

    def wrong(self: Attention, x: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, _ = self._queries(x, cos, sin)
        rows = torch.arange(len(keys)).expand(len(x), -1)
        seen = rows.where(rows < len(keys) - len(x) + 1 + torch.arange(len(x))[:, None], -1)
        o = sparse_attention(q, keys, seen, None, None, self.sinks, self.scale)
        return self._output(o, cos, sin)

    patch.setattr(Attention, "over", wrong)


@pytest.mark.parametrize(
    "mistake",
    [
        newest_row_missing,
        window_less_the_block,
        block_one_position_on,
        no_inverse_rotation,
        bias_of_the_current_token,
        block_rows_in_order,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_proposing_shows(mistake) -> None:  # type: ignore[no-untyped-def]
    assert compare(model(), official(DraftKind.DSPARK), proposing=mistake).logits > MISTAKEN


@pytest.mark.parametrize(
    "mistake",
    [context_one_position_on, taps_reversed, norm_of_attention_on_the_context],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_reading_shows(mistake) -> None:  # type: ignore[no-untyped-def]
    assert compare(model(), official(DraftKind.DSPARK), reading=mistake).logits > MISTAKEN


def test_a_mistake_in_the_confidence_shows_in_nothing_else() -> None:
    golden = official(DraftKind.DSPARK)
    found = compare(model(), golden, proposing=confidence_after_the_norm)
    assert found.same and found.logits < TOLERANCE
    assert found.confidence > MISTAKEN


def test_without_a_head_proposals_follow_the_bigram_table() -> None:
    """A closed form: base logits of 0 leave W2·W1, and a confidence that reads W1 alone."""
    weights = random_weights(CONFIG, 0, DraftKind.DSPARK)
    weights["head.weight"] = torch.zeros_like(weights["head.weight"])
    weights[CONFIDENCE][:, : CONFIG.hidden_size] = 0
    w1, w2 = weights[f"{MARKOV}1.weight"], weights[f"{MARKOV}2.weight"]
    session = load(InMemoryWeights(CONFIG, weights), draft=DraftKind.DSPARK).session(64)
    session.forward(random_ids(CONFIG, 20))
    for token in range(CONFIG.vocab_size):
        draft = session.propose(token, BLOCK)
        previous = [token, *draft.ids.tolist()[:-1]]
        table = w1.double() @ w2.double().T
        assert draft.ids.tolist() == table[previous].argmax(-1).tolist()
        assert draft.confidence is not None
        expected = w1[previous].double() @ weights[CONFIDENCE][0, CONFIG.hidden_size :].double()
        assert torch.allclose(draft.confidence.double(), expected, atol=1e-5)


@pytest.mark.parametrize("factor", ["1", "2"])
def test_an_empty_markov_head_is_refused(factor: str) -> None:
    weights = random_weights(CONFIG, 0, DraftKind.DSPARK)
    name = f"{MARKOV}{factor}.weight"
    weights[name] = torch.zeros_like(weights[name])
    with pytest.raises(RuntimeRefusal, match=f"markov_w{factor}.weight holds nothing but zeros"):
        load(InMemoryWeights(CONFIG, weights), draft=DraftKind.DSPARK)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, dspark_noise_token_id=None),
        dataclasses.replace(CONFIG, dspark_target_layer_ids=None),
    ],
    ids=["noise", "layers"],
)
def test_a_config_that_does_not_say_enough_is_refused(config: ModelConfig) -> None:
    weights = random_weights(CONFIG, 0, DraftKind.DSPARK)
    with pytest.raises(
        DraftRefusal, match=r"cannot be used: .* does not have all of .*drafts=False"
    ):
        load(InMemoryWeights(config, weights), draft=DraftKind.DSPARK)


def test_other_taps_than_three_are_refused() -> None:
    weights = random_weights(CONFIG, 0, DraftKind.DSPARK)
    config = dataclasses.replace(CONFIG, dspark_target_layer_ids=(3, 4))
    with pytest.raises(RuntimeRefusal, match=r"dspark_target_layer_ids is \[3, 4\], expected 3"):
        load(InMemoryWeights(config, weights), draft=DraftKind.DSPARK)
