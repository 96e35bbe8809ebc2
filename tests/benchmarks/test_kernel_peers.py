"""Kernels beside ours have one judge; a wrong one, a missing one and a failing one show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_peers
from benchmarks.kernel_peers import Peer, PeerLine, compare
from benchmarks.peer_work import Product, Routed, Work
from benchmarks.tables import peer_line
from dsv4.bench.kernels import Machine
from dsv4.formats.model.releases import FLASH
from tests.support.emulator import Emulator

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    FLASH,
    vocab_size=256,
    hidden_size=512,
    num_attention_heads=4,
    head_dim=128,
    q_lora_rank=128,
    o_lora_rank=128,
    o_groups=2,
    moe_intermediate_size=512,
    n_routed_experts=8,
    num_experts_per_tok=2,
)


def once(runs: Sequence[Callable[[], object]]) -> float:
    """Runs everything; takes 2 us."""
    for run in runs:
        run()
    return 2e-6


def lines(
    *peers: Peer, shapes: str = "", rows: Sequence[int] = (1, 3), timer: kernel_peers.Timer = once
) -> list[PeerLine]:
    machine = Machine("none", 1e12, 1e12)
    return list(
        compare(
            SMALL,
            "flash",
            rows,
            Emulator(SMALL),
            machine,
            CPU,
            shapes=shapes,
            peers=peers,
            timer=timer,
        )
    )


def test_ours_and_torch_are_right_on_every_shape() -> None:
    found = lines(kernel_peers.PEERS[0])
    assert [line.shape for line in found[::4]] == [
        *("lm_head", "wq_b", "wo_a", "wo_b", "shared w1 w3", "shared w2", "routed")
    ]
    assert [peer_line(line) for line in found if not line.right] == []
    assert {line.ratio for line in found if line.peer != "dsv4"} == {1.0}


def test_bytes_are_those_that_a_kernel_reads() -> None:
    ours, theirs = lines(kernel_peers.PEERS[0], shapes="wq_b")[:2]
    assert theirs.nbytes == 2 * SMALL.num_attention_heads * SMALL.head_dim * SMALL.q_lora_rank
    assert ours.nbytes < theirs.nbytes < 2.1 * ours.nbytes
    assert theirs.fraction == pytest.approx(theirs.nbytes / 1e12 / 2e-6)


def _altered(alter: Callable[[Tensor], Tensor]) -> Peer:
    def forms(work: Work) -> Mapping[str, kernel_peers.Prepare]:
        [(name, prepare), *_] = kernel_peers.torch_forms(work).items()

        def wrong(work: Work) -> kernel_peers.Run:
            run = prepare(work)
            return lambda: alter(run())

        return {name: wrong}

    return Peer("altered", forms, kernel_peers.bfloat16_bytes)


@pytest.mark.parametrize("shapes", ["lm_head", "wo_b", "routed"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda y: y * 1.1,
        lambda y: y.roll(1, 1),
        lambda y: y[:, :-1],
        lambda y: torch.where(torch.arange(y.shape[1]) == 7, float("nan"), y),
    ],
)
def test_a_wrong_kernel_is_called_wrong(shapes: str, alter: Callable[[Tensor], Tensor]) -> None:
    found = lines(_altered(alter), shapes=shapes)
    assert [line.right for line in found] == [True, False] * 2
    assert "WRONG" in peer_line(found[1])


def _raising(error: Exception) -> Peer:
    def forms(work: Work) -> Mapping[str, kernel_peers.Prepare]:
        raise error

    return Peer("peer", forms, lambda work: 1)


def test_what_is_missing_or_fails_is_a_line() -> None:
    missing = ModuleNotFoundError("No module named 'humming'", name="humming")
    failing = RuntimeError("no kernel\nfor this")
    found = lines(_raising(missing), _raising(failing), shapes="wo_a")
    assert [line.fault for line in found[:3]] == [
        "",
        "not installed: humming",
        "RuntimeError: no kernel",
    ]
    assert found[2].seconds is None


def test_the_fastest_right_form_counts() -> None:
    def forms(work: Work) -> Mapping[str, kernel_peers.Prepare]:
        assert isinstance(work, Product)
        plain = kernel_peers.torch_forms(work)["linear"]
        return {"slow": plain, "quick": plain, "wrong": lambda work: lambda: work.x[:, 0]}

    times = iter([2e-6, 9e-6, 4e-6, 1e-6])
    peer = Peer("peer", forms, lambda work: 1000)
    found = lines(peer, shapes="wo_b", rows=(2,), timer=lambda runs: next(times))
    assert (found[1].form, found[1].seconds, found[1].ratio) == ("quick", 4e-6, 2.0)


def test_triton_kernels_on_its_interpreter() -> None:
    """Only where Triton is installed and interprets."""
    pytest.importorskip("triton")
    found = lines(kernel_peers.PEERS[1])
    assert [peer_line(line) for line in found if not line.right] == []


def test_experts_are_those_that_tokens_chose() -> None:
    chosen = torch.tensor([[3, 1], [1, 7]], dtype=torch.int32)
    stack = (torch.zeros(8, 4, 2), torch.zeros(8, 4, 1), torch.ones(8))
    work = Routed(torch.zeros(2, 4), stack, stack, chosen, torch.ones(2, 2), 1.0)
    assert work.chosen == [1, 3, 7]
    assert work.front(1).chosen == [1, 3]
