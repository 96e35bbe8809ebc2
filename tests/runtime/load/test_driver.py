"""The GPU's arena on an emulated driver: what is queued when, and that nothing stays behind."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from dsv4.formats.errors import RuntimeRefusal, StoreError
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime import cuda_driver
from dsv4.runtime.load import Settings, load_weights, plan_load
from dsv4.runtime.load.arena import HUGE_PAGE, CudaArena
from dsv4.runtime.load.jobs import make_jobs
from dsv4.runtime.load.readers import Readers
from tests.support.emulated_driver import EmulatedCuda

SLOT = 16 << 10


def _load(
    store: PackedStore, cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Array path -> what arrived of it."""
    monkeypatch.setattr(cuda_driver, "_libraries", lambda: (cuda, cuda))
    plan = plan_load(store)
    memory = torch.full((plan.nbytes,), 0xA5, dtype=torch.uint8)
    stream: Any = cuda
    arena = CudaArena(memory, stream, cuda_driver.Driver())
    jobs = make_jobs(plan.spans(), SLOT, lambda file: True)
    with arena.slots(4, SLOT) as slots:
        assert slots[0].address % HUGE_PAGE == 0 and len(cuda.events) == 4
        Readers(store, arena, hashes=lambda file: True).run(jobs, [slots[:2], slots[2:]])
    return {path: memory[p.at : p.at + p.nbytes] for path, p in plan.arrays.items()}


@pytest.mark.parametrize("eager", [False, True])
def test_bytes_arrive_only_if_slots_are_waited_for(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    cuda = EmulatedCuda(eager=eager)
    found = _load(sample, cuda, monkeypatch)
    wanted = load_weights(sample, "cpu", settings=Settings(readers=1))
    equal = all(
        torch.equal(raw, wanted.share_of(path).reshape(-1).view(torch.uint8))
        for path, raw in found.items()
    )
    assert equal is not eager
    assert len(cuda.entered) == 2
    assert not cuda.pinned and not cuda.events


def test_after_a_failure_nothing_is_pinned(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    cuda = EmulatedCuda()
    with pytest.raises(StoreError, match="Input/output error"):
        _load(sample, cuda, monkeypatch)
    assert not cuda.pinned and not cuda.events


@pytest.mark.parametrize(
    "call",
    ["cuMemHostRegister", "cuEventCreate", "cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuEventRecord"],
)
def test_a_call_that_fails_is_named(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    spelt = next(name for name in cuda_driver._ARGUMENTS if name.removesuffix("_v2") == call)
    cuda = EmulatedCuda(failing={spelt: 2})
    with pytest.raises(RuntimeRefusal, match=f"the CUDA driver's {call} failed with error 2"):
        _load(sample, cuda, monkeypatch)
    assert not cuda.pinned and not cuda.events


def test_waking_without_a_gpu_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-that-is-not-there.so")
    failures: list[Any] = []
    monkeypatch.setattr("threading.excepthook", failures.append)
    cuda_driver.wake().join()
    assert not failures
