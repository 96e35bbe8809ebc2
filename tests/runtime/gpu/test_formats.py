"""Stores of any recipe: the kernels that they need, and a shared expert in any format, run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsv4.bench.random_weights import RandomWeights
from dsv4.convert.metadata import planned_nodes
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import Matrix
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.reference.linear import dequantize_rows
from dsv4.kernels.reference.moe import routed_experts
from dsv4.runtime.cuda_driver import Driver
from dsv4.runtime.gpu import rehearsal
from dsv4.runtime.gpu.engine import at_once
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.operands import Layer, parts, read_model
from dsv4.runtime.gpu.rehearsal import all_kernels, outlined_model
from dsv4.runtime.gpu.standard import standard_model
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Part, Settings, load_weights
from dsv4.runtime.load.outline import OutlinedWeights
from dsv4.runtime.load.placement import Placement
from dsv4.runtime.load.records import load_records
from dsv4.synthetic.store import make_store, plan_store, shaped
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.runtime.test_fit import SMALL as STORED
from tests.support.emulator import Emulator


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


def _mixed(weights: Other, own: Layer, x: Tensor, choice: Tensor, share: Tensor) -> Tensor:
    """What a step leaves of one layer's experts."""
    engine = HostModel(weights, Emulator(SMALL), CPU).engine(64, chunk=0)
    rows = len(x)
    tokens = engine._place(torch.arange(rows), 0, 0)
    run = engine.step_pass(engine.model.functions.launch, at_once, tokens)
    run.a.topk_idx.copy_(choice)
    run.a.topk_weights.copy_(share)
    return sum((part.double() for part in run.mix_experts(own, x)), torch.zeros(()))


@pytest.mark.parametrize("kind", ["nvfp4", "bf16"])
def test_a_shared_expert_in_launches_of_its_own(kind: str) -> None:
    """Against the model's routed experts, and the shared one in float64."""
    weights = Other(SMALL, kind)
    layer = read_model(weights, [1]).layers[0]
    shared = layer.experts.shared
    assert not shared.in_one_launch
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(3, SMALL.hidden_size, generator=rng).to(torch.bfloat16)
    choice, share = torch.tensor([[0, 5], [3, 1], [5, 7]]), torch.rand(3, 2, generator=rng)
    stack = weights.experts("layers.1.ffn.experts")
    wanted = routed_experts(x.float(), choice, share, stack, limit=SMALL.swiglu_limit).double()
    w1, w2, w3 = (
        dequantize_rows(weights.matrix(f"layers.1.ffn.shared_experts.{n}.weight"), 0, 512).double()
        for n in ("w1", "w2", "w3")
    )
    limit = SMALL.swiglu_limit
    gate, up = (x.double() @ w1.T).clamp(max=limit), (x.double() @ w3.T).clamp(-limit, limit)
    wanted += (functional.silu(gate) * up) @ w2.T
    found = _mixed(weights, layer, x, choice, share)
    assert float((found - wanted).std() / wanted.std()) < 2.0**-7
    shared = dataclasses.replace(shared, w1=shared.w3, w3=shared.w1)
    other = dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, shared=shared))
    swapped = _mixed(weights, other, x, choice, share)
    assert float((swapped - wanted).std() / wanted.std()) > 0.1


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
    ]
    assert all("bf16" in name for name in native)
    rounded = _kernels(config, "nvfp4")
    assert not any("fp8" in name for name in rounded)
    whole = {name for name in rounded if name.startswith("experts_hidden")}
    assert whole and all("sharedfalse" in name for name in whole)


def test_an_outline_is_what_is_loaded(tmp_path: Path) -> None:
    make_store(tmp_path / "packed", STORED)
    store = PackedStore.open(tmp_path / "packed")
    shape = STORED.num_hidden_layers, STORED.n_routed_experts
    placement = Placement.resident(*shape)
    records = load_records(store, placement, CPU, Settings(), Driver)
    memory = ExpertMemory.make(placement, records.device, records.host, 0)
    weights = load_weights(store, "cpu", parts={Part.CORE, Part.EXPERTS}, records=True)
    loaded = dataclasses.replace(read_model(Loaded(weights, memory)), memory=None)
    outline = read_model(Loaded(OutlinedWeights(store)))
    for one, other in zip(parts(loaded, torch.Tensor), parts(outline, torch.Tensor), strict=True):
        assert (one.shape, one.dtype, other.device.type) == (other.shape, other.dtype, "meta")
    few = read_model(Loaded(OutlinedWeights(store)), [2])
    assert [layer.index for layer in few.layers] == [2]


def test_layers_that_differ_in_one_tensor_are_both_outlined() -> None:
    config = dataclasses.replace(shaped("flash", 8), num_hash_layers=0)
    store = planned_nodes(plan_store(config), "flash")
    usual = [layer.index for layer in outlined_model(store).layers]
    assert usual == [0, 1, 2]  # one of each kind of attention
    path = next(p for p in store.hierarchy.arrays if p.startswith("layers/6/ffn/gate/codes"))
    spec = store.hierarchy.arrays[path]
    odd = dataclasses.replace(spec, chunk=(spec.chunk[0] // 2, *spec.chunk[1:]))
    arrays = {**store.hierarchy.arrays, path: odd}
    hierarchy = dataclasses.replace(store.hierarchy, arrays=arrays)
    changed = dataclasses.replace(store, hierarchy=hierarchy)
    assert [layer.index for layer in outlined_model(changed).layers] == [*usual, 6]
