"""Stores of any recipe: the kernels that they need, and a shared expert in any format, run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv4.bench.random_weights import RandomWeights
from dsv4.convert.metadata import planned_nodes
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import Matrix
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.signature import Kernel
from dsv4.runtime.gpu import rehearsal
from dsv4.runtime.gpu.operands import parts, read_model
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.rehearsal import all_kernels, outlined_model
from dsv4.runtime.gpu.standard import standard_model
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Part, load_weights
from dsv4.runtime.load.outline import OutlinedWeights
from dsv4.synthetic.store import plan_store, shaped
from tests.runtime.gpu.test_session import CPU, IDS, SMALL, reference, session_of


class Other(RandomWeights):
    """Shared experts in another format than recipe `standard` has them."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__(config, CPU)
        self.kind = kind

    def matrix(self, name: str) -> Matrix:
        if "shared_experts" not in name:
            return super().matrix(name)
        if name not in self._made:
            rows, cols = self._shapes[name].shape
            values = self._nvfp4(name, rows, cols) if self.kind == "nvfp4" else self._plain(name)
            self._made[name] = values
        return self._made[name]


@pytest.mark.parametrize("chunk", [0, 32])
@pytest.mark.parametrize("kind", ["nvfp4", "bf16"])
def test_a_shared_expert_in_launches_of_its_own(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Program, "replay", Program.launch)
    weights = Other(SMALL, kind)
    session = session_of(weights, chunk=chunk)
    found, wanted = session.forward(IDS), reference(weights, IDS)
    error = (found - wanted).square().mean(1).sqrt() / wanted.std()
    assert float(error.median()) < 0.03
    assert "swiglu" in session.model.library.launched  # type: ignore[attr-defined]

    session.reset()
    session.model.library._swiglu = lambda given, buffers: {"h": buffers["h"] * 0}  # type: ignore[attr-defined]
    wrong = (session.forward(IDS) - wanted).square().mean(1).sqrt() / wanted.std()
    assert float(wrong.median()) > 0.03


def _kernels(config: ModelConfig, recipe: str) -> dict[str, Kernel]:
    store = planned_nodes(plan_store(config, recipe), recipe)
    return {one.name: one for one in all_kernels(outlined_model(store))}


def test_a_planned_store_needs_the_kernels_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "CAPACITIES", (1 << 15,))
    config = shaped("flash", 4, experts=96)
    standard = {one.name for one in all_kernels(standard_model(config))}
    assert _kernels(config, "standard").keys() == standard
    native = _kernels(config, "native").keys() - standard
    assert sorted(name.split("_weights")[0].split("_kind")[0] for name in native) == [
        "gemv",
        "router",
        "router",
    ]
    assert all("bf16" in name for name in native)
    rounded = _kernels(config, "nvfp4")
    assert not any("fp8" in name for name in rounded)
    whole = {name for name in rounded if name.startswith("experts_hidden")}
    assert whole and all("sharedfalse" in name for name in whole)


def test_an_outline_is_what_is_loaded(standard_store: PackedStore) -> None:
    store = PackedStore.open(standard_store)  # type: ignore[arg-type]
    loaded = read_model(Loaded(load_weights(store, "cpu", parts={Part.CORE, Part.EXPERTS})))
    outline = read_model(Loaded(OutlinedWeights(store)))
    for one, other in zip(parts(loaded, torch.Tensor), parts(outline, torch.Tensor), strict=True):
        assert (one.shape, one.dtype, other.device.type) == (other.shape, other.dtype, "meta")
    few = read_model(Loaded(OutlinedWeights(store)), [2])
    assert [layer.index for layer in few.layers] == [2]


def test_layers_that_differ_in_one_tensor_are_both_outlined() -> None:
    config = dataclasses.replace(shaped("flash", 8), num_hash_layers=0)
    store = planned_nodes(plan_store(config), "flash")
    usual = [layer.index for layer in outlined_model(store).layers]
    assert usual == [0, 1, 2, 3]  # the first, another without blocks, CSA, HCA
    path = next(p for p in store.hierarchy.arrays if p.startswith("layers/6/ffn/gate/codes"))
    spec = store.hierarchy.arrays[path]
    odd = dataclasses.replace(spec, chunk=(spec.chunk[0] // 2, *spec.chunk[1:]))
    arrays = {**store.hierarchy.arrays, path: odd}
    hierarchy = dataclasses.replace(store.hierarchy, arrays=arrays)
    changed = dataclasses.replace(store, hierarchy=hierarchy)
    assert [layer.index for layer in outlined_model(changed).layers] == [*usual, 6]
