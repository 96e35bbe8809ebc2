"""Checkpoints and stores that many tests read. Tests that damage a store copy it first."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsv4.convert.engine import convert
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.runtime.gpu.program import Program
from dsv4.synthetic.tiny import TINY, write_tiny

# Two workers on two cores: more threads only wait for each other (ten times slower, measured on
# two shared cores of an AMD EPYC). Child processes inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_graphs() -> Iterator[None]:
    """Programs of the GPU's plan are launched call by call: a CPU records no graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "replay", Program.launch)
        yield


MakeSource = Callable[[ModelConfig, DraftKind], Path]


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Writes the tiny checkpoint of a configuration once a session."""
    made: dict[tuple[ModelConfig, DraftKind], Path] = {}

    def make(config: ModelConfig, draft: DraftKind) -> Path:
        key = (config, draft)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "hub"
            write_tiny(made[key], config, draft=draft)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_source(make_source: MakeSource) -> Path:
    """The default tiny checkpoint, MTP block included."""
    return make_source(TINY, DraftKind.MTP)


@pytest.fixture(scope="session")
def native_store(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packed by recipe `native`. Not to be written to."""
    out = tmp_path_factory.mktemp("native") / "packed"
    convert(tiny_source, out, recipe="native")
    return out


@pytest.fixture(scope="session")
def standard_store(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packed by recipe `standard`. Not to be written to."""
    out = tmp_path_factory.mktemp("standard") / "packed"
    convert(tiny_source, out, recipe="standard")
    return out


@pytest.fixture(scope="session")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one layer, wide enough to be cut in eight, by rows and into slabs."""
    config = dataclasses.replace(
        TINY,
        num_hidden_layers=1,
        compress_ratios=(0,),
        num_hash_layers=0,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_draft_layers=0,
    )
    folder = tmp_path_factory.mktemp("wide")
    write_tiny(folder / "hub", config, draft=DraftKind.NONE)
    convert(folder / "hub", folder / "packed", recipe="native")
    return folder / "packed"
