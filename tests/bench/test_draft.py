"""`bench decode --draft` on emulated kernels: what it compares, and what a round is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsv4.bench import draft
from dsv4.bench.decode import few_layers
from dsv4.bench.kernels import Machine
from dsv4.commands.bench_tables import draft_table
from dsv4.formats.model.releases import DRAFTING
from dsv4.runtime.gpu.draft_plan import Proposal
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.session import GpuSession
from tests.runtime.gpu.test_draft_plan import BLOCK, CONFIG, weights
from tests.runtime.gpu.test_rewind import Quick
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.support.emulator import Emulator


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(runs: list[Any]) -> float:
        for run in runs:
            run()
        return 1.0

    monkeypatch.setattr(Program, "replay", Program.launch)
    monkeypatch.setattr(draft, "graph_seconds", once)
    monkeypatch.setattr(draft, "measure_machine", lambda device: Machine("none", 1.0, 1.0))
    monkeypatch.setattr(draft, "ROUNDS", 2)
    monkeypatch.setattr(draft, "WARM", 1)
    monkeypatch.setattr(draft, "PROMPT", 4)
    monkeypatch.setattr(draft, "MORE", 1)


def session(made: type[Emulator] = Quick, room: int = 160) -> GpuSession:
    return HostModel(weights(), made(CONFIG), CPU, drafts=True).session(room, chunk=0)


def test_right_proposals_are_right_and_wrong_ones_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = draft.compare(session(Emulator), weights())
    assert found.repeatable and found.ids > 0.5 and found.ours[0] < 0.1
    assert dataclasses.replace(found, ours=found.bfloat16).right
    for ours in ((1.0, 0.0), (0.0, 1.0)):
        assert not dataclasses.replace(found, ours=ours).right
    assert not dataclasses.replace(found, ours=(0.0, 0.0), repeatable=False).right
    place = Proposal.place

    def wrong(self: Proposal, *at: int) -> None:
        place(self, *at)
        self.tokens.position.add_(1)

    monkeypatch.setattr(Proposal, "place", wrong)
    found = draft.compare(session(Emulator), weights())
    assert not found.right and found.ours[0] > 0.1


def test_a_round_goes_on_by_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = session()
    fed: list[tuple[int, int]] = []
    run = one.append_and_draw_each

    def noted(ids: Any, sampler: Any) -> Any:
        fed.append((one.position, len(ids)))
        return run(ids, sampler)

    monkeypatch.setattr(one, "append_and_draw_each", noted)
    assert draft._round_seconds(one, 100, 3, 2) > 0
    assert fed == [(100, 4), (102, 4), (104, 4)] and one.position == 0


def test_a_report() -> None:
    found = draft.measure(session(), "flash", 64)
    assert [one.drafts for one in found.rounds] == list(range(1, BLOCK + 1))
    assert [len(one.seconds) for one in found.rounds] == list(range(2, BLOCK + 2))
    assert found.right and found.launches > 40
    table = draft_table(dataclasses.replace(found, plain_seconds=1.0))
    assert len(table.columns) == 5 + BLOCK + 1 and table.row_count == BLOCK


def test_the_arithmetic_is_that_of_the_facts() -> None:
    """Of 43 layers with random choices: 4.48 ms of a token, 9.64 of six, 0.85 of a proposal."""
    steps = [draft.arithmetic(DRAFTING["flash"], rows) - draft.PROPOSAL for rows in (1, 2, 4, 6)]
    assert [round(1e3 * one, 1) for one in steps] == [4.5, 5.6, 7.6, 9.6]


def test_few_layers_are_tapped_at_their_end() -> None:
    assert few_layers(DRAFTING["flash"], 5).dspark_target_layer_ids == (2, 3, 4)
