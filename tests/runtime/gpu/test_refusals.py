"""What a GPU cannot do is refused by name before anything is allocated or loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.commands.exit_codes import endings
from dsv4.convert.metadata import planned_nodes
from dsv4.formats.errors import KernelError, OutOfSpaceError, RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.signature import Kernel
from dsv4.runtime.gpu import engine
from dsv4.runtime.gpu.caches import LayerCaches, allocate_caches
from dsv4.runtime.gpu.load import require_kernels
from dsv4.runtime.gpu.operands import parts
from dsv4.runtime.load import arena
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from dsv4.synthetic.store import plan_store, shaped
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator


@pytest.fixture(scope="module")
def model() -> HostModel:
    return HostModel(RandomWeights(SMALL, CPU), Emulator(SMALL), CPU)


def test_a_session_that_does_not_fit_is_refused_before_it_is_allocated(
    model: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    right = arena.require_memory

    def remembered(nbytes: int, device: torch.device, what: str, instead: str) -> None:
        asked.append(nbytes)
        right(nbytes, device, what, instead)

    monkeypatch.setattr(engine, "require_memory", remembered)
    session = model.session(5000)
    own = session.engine.buffers, session.engine.tables, session._ids
    used = sum(one.nbytes for one in parts(own, Tensor))
    assert used <= asked[0] <= 2 * used  # tables are computed in FP64

    free = asked[0] + arena.HEADROOM
    monkeypatch.setattr(arena, "free_memory", lambda device: (free, "the GPU"))
    model.session(5000)
    monkeypatch.setattr(engine, "allocate_caches", _only_sizes)
    sentence = (
        r"a session of 9000 tokens needs \d+\.\d MB, the GPU has \d+\.\d MB free; open it with a"
    )
    with pytest.raises(OutOfSpaceError, match=sentence):
        model.session(9000)
    with pytest.raises(OutOfSpaceError, match=r"3 sessions of 5000 tokens need \d+"):
        model.engine(5000, slots=3)


def _only_sizes(
    config: ModelConfig,
    slots: int,
    capacity: int,
    rows: int,
    device: torch.device,
    *,
    drafts: int,
) -> tuple[LayerCaches, ...]:
    assert device.type == "meta"
    return allocate_caches(config, slots, capacity, rows, device, drafts=drafts)


def test_a_context_longer_than_the_model_or_the_session_is_refused(model: HostModel) -> None:
    limit = SMALL.max_position_embeddings
    with pytest.raises(RuntimeRefusal, match=f"max_seq_len is {limit + 1}, expected 1 to {limit}"):
        model.session(limit + 1)
    session = model.session(16)
    with pytest.raises(RuntimeRefusal, match="12 prompt tokens and 5 new ones exceed the 16"):
        generate(session, list(range(12)), 5, Sampler())
    with pytest.raises(RuntimeRefusal, match=r"17 tokens after the 0 already .* capacity of 16"):
        session.forward(torch.arange(17))
    assert session.position == 0


class Without(Emulator):
    """A library that lacks the kernels of one operation."""

    def __init__(self, operation: str) -> None:
        super().__init__(FLASH)
        self.operation = operation

    def function(self, kernel: Kernel) -> Any:
        """As `Library.function` refuses."""
        if kernel.operation == self.operation:
            raise KernelError(f"kernel {kernel.name} is not built")
        return None


@pytest.mark.parametrize(
    "operation", ["append", "indexer", "attention", "experts", "mhc", "gemv", "router"]
)
def test_kernels_are_missed_before_weights_are_loaded(operation: str) -> None:
    store = planned_nodes(plan_store(shaped("flash", 4)), "flash")
    with pytest.raises(KernelError, match=f"kernel {operation}_.* is not built"):
        require_kernels(store, Without(operation))
    require_kernels(store, Without("xxh3"))  # readers compare checksums without it


def test_memory_that_runs_out_on_the_device_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"
    with pytest.raises(SystemExit) as left, endings():
        raise torch.OutOfMemoryError(reason)
    assert left.value.code == 3
    said = capsys.readouterr().err
    assert said == "dsv4: out of device memory: CUDA out of memory\n"
    with pytest.raises(RuntimeError, match="a bug"), endings():
        raise RuntimeError("a bug")
