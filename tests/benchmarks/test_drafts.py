"""The example's drafter guesses far better than a random one, and what is counted is so."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
from benchmarks.drafts import PROMPT, Acceptance, Round, acceptance
from benchmarks.quality import HELD_OUT, read_windows
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.inventory import DraftKind, Kind, parameters
from dsv4.formats.numeric.operands import Matrix
from dsv4.kernels.reference.moe import ExpertStack
from dsv4.runtime.dspark import DSpark
from dsv4.runtime.model import Model, load
from dsv4.runtime.weights import Weights

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-dsv4"
PROMPTS, TOKENS = 2, 32
LEAST_FIRST, LEAST_LENGTH = 0.25, 1.3  # 0.34 and 1.46 were measured
TOLERANCE = 1e-3  # of the logits' deviation: float32 sums beside wide ones; a fault is above 0.1


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("example") / "packed"
    dsv4.convert(EXAMPLE, place, recipe="native")
    return place


@pytest.fixture(scope="module")
def greedy(packed: Path) -> Acceptance:
    (found,) = acceptance(load_store(packed), EXAMPLE, PROMPTS, TOKENS, [0.0])
    return found


def load_store(packed: Path) -> Model:
    model = dsv4.load(packed, device="cpu")
    assert isinstance(model, Model)
    return model


class Untrained:
    """A store, but for its draft layers' matrices and tables, which are random."""

    def __init__(self, store: Weights) -> None:
        self.store = store
        self.config = store.config
        self.draw = torch.Generator().manual_seed(1)

    def tensor(self, name: str) -> Tensor:
        value = self.store.tensor(name)
        return self._random(value) if name.startswith("mtp.") and value.dim() > 1 else value

    def matrix(self, name: str) -> Matrix:
        if not name.startswith("mtp."):
            return self.store.matrix(name)
        shapes = {p.name: p.shape for p in parameters(self.config, DraftKind.DSPARK, 1)}
        return self._random(torch.empty(shapes[name]))

    def experts(self, prefix: str) -> ExpertStack:
        return self.store.experts(prefix)

    def _random(self, like: Tensor) -> Tensor:
        value: Tensor = torch.randn(like.shape, generator=self.draw) * like.shape[-1] ** -0.5
        return value


def test_greedy_drafts_of_the_example_are_accepted_and_change_no_text(greedy: Acceptance) -> None:
    assert greedy.same_text
    assert greedy.reached[0] > LEAST_FIRST
    assert greedy.length > LEAST_LENGTH


def test_drawn_text_is_the_same_with_drafts(packed: Path) -> None:
    (found,) = acceptance(load_store(packed), EXAMPLE, 1, 24, [1.0])
    assert found.same_text
    assert found.rounds > 10


def test_random_draft_layers_guess_hardly_anything(packed: Path, greedy: Acceptance) -> None:
    model = load(Untrained(dsv4.open(packed).store), draft=DraftKind.DSPARK)
    (found,) = acceptance(model, EXAMPLE, PROMPTS, TOKENS, [0.0])
    assert found.same_text
    assert found.reached[0] < greedy.reached[0] / 5


@pytest.mark.long
def test_a_drafter_that_reads_its_layers_in_the_wrong_order_is_seen(
    packed: Path, greedy: Acceptance, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = DSpark.observe
    monkeypatch.setattr(
        DSpark, "observe", lambda self, tapped, *rest: observe(self, [*tapped][::-1], *rest)
    )
    (found,) = acceptance(load_store(packed), EXAMPLE, PROMPTS, TOKENS, [0.0])
    assert found.same_text
    assert found.length < greedy.length


def test_counts_are_those_of_the_rounds() -> None:
    rounds = [Round((0.9, 0.5), 2), Round((0.7, 0.3), 0), Round((0.95,), 1)]
    found = Acceptance.of(0.0, rounds, same_text=True)
    assert found.length == 2.0
    assert found.reached == (2 / 3, 1 / 2)
    assert [one.count for one in found.bins] == [0, 0, 1, 1, 2]  # 0.3 follows a wrong one
    assert found.bins[4].confidence == pytest.approx(0.925)
    assert found.error == pytest.approx((0.5 + 0.7 + 2 * 0.075) / 4)


def test_a_checkpoint_without_draft_layers_is_refused(packed: Path) -> None:
    model = load(dsv4.open(packed).store)
    with pytest.raises(RuntimeRefusal, match="no draft layers"):
        acceptance(model, EXAMPLE, 1, 8)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    return importlib.import_module("tiny_dspark")


def test_what_is_trained_is_what_runs(
    packed: Path, training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's stage in float32 and the runtime's, whose sums are wide: logits, confidence."""
    model = load_store(packed)
    store = dsv4.open(packed)
    config = model.config
    weights: dict[str, Any] = {}
    stacks: dict[str, list[Tensor]] = {}
    for parameter in parameters(config, DraftKind.DSPARK, 1):
        if not parameter.name.startswith("mtp.0."):
            continue
        name, value = parameter.name.removeprefix("mtp.0."), store.dequantize(parameter.name)
        if parameter.kind is Kind.EXPERT:
            stacks.setdefault(f"ffn.experts.{name.split('.')[3]}", []).append(value)
        else:
            weights[name] = value.float()
    weights |= {name: torch.stack(each).float() for name, each in stacks.items()}
    ids = read_windows(EXAMPLE, EXAMPLE / HELD_OUT, 512)[0, :PROMPT]
    embed, head = (store.dequantize(f"{name}.weight") for name in ("embed", "head"))
    stage = training.Stage(config, embed.float(), head.float(), PROMPT, torch.float32)
    taps: list[Tensor] = []
    observe = DSpark.observe

    def tap(self: DSpark, tapped: list[Tensor], *rest: Any) -> None:
        taps.append(torch.cat([streams.mean(1) for streams in tapped], -1))
        observe(self, tapped, *rest)

    monkeypatch.setattr(DSpark, "observe", tap)
    session = model.session(PROMPT + 8)
    for anchor in (0, 9, 140, 200):
        session.reset()
        session.forward(ids[: anchor + 1])
        draft = session.propose(int(ids[anchor + 1]), 5)
        block = ids.clone()
        block[anchor + 2 : anchor + 7] = draft.ids
        padded = torch.zeros(1, PROMPT, taps[-1].shape[1])
        padded[0, : anchor + 1] = taps[-1]
        rows = stage(weights, padded, block[None], torch.tensor([[anchor]]))
        spread = float(draft.logits.std())
        assert float((rows.logits[0] - draft.logits).abs().max()) < TOLERANCE * spread
        assert draft.confidence is not None
        assert float((rows.confidence[0] - draft.confidence).abs().max()) < TOLERANCE * spread
