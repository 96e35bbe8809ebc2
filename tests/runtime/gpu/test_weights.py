"""A loaded store's arrays are the kernels' operands; what no kernel reads is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dsv4.bench.decode import few_layers
from dsv4.formats.model.releases import FLASH, MODELS
from dsv4.formats.numeric.operands import Fp8Matrix
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.ops.gemv.contract import Weight, weights_of
from dsv4.runtime.gpu import prefill_plan
from dsv4.runtime.gpu.operands import MatrixOperand, parts
from dsv4.runtime.gpu.rehearsal import all_kernels, chunk_kernels, step_kernels
from dsv4.runtime.gpu.standard import standard_model
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load import Part, load_weights


@pytest.fixture(scope="module")
def store(standard_store: Path) -> PackedStore:
    return PackedStore.open(standard_store)


@pytest.fixture(scope="module")
def loaded(store: PackedStore) -> Loaded:
    found = load_weights(store, "cpu", parts={Part.CORE, Part.EXPERTS}, records=True)
    return Loaded(found)


def test_matrices_are_views_of_the_arena(store: PackedStore, loaded: Loaded) -> None:
    name = "layers.0.attn.wq_b.weight"
    found, kept = loaded.matrix(name), store.matrix(name)
    assert isinstance(found, Fp8Matrix) and isinstance(kept, Fp8Matrix)
    assert torch.equal(found.codes.view(torch.uint8), kept.codes.view(torch.uint8))
    assert found.codes.data_ptr() == loaded.matrix(name).codes.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_reads_what_recipe_standard_stores(model: str) -> None:
    config = MODELS[model]
    operands = standard_model(config)
    assert operands.head.weight == Weight("nvfp4", config.vocab_size, config.hidden_size)
    known = {weight for group in weights_of(config).values() for weight in group}
    used = {one.weight for one in parts(operands, MatrixOperand)}
    assert used - {layer.gate.matrix.weight for layer in operands.layers} == known
    names = [kernel.name for kernel in all_kernels(standard_model(config))]
    assert len(set(names)) < 100 < len(names)


def test_a_step_is_thirteen_launches_a_layer() -> None:
    kernels = step_kernels(standard_model(FLASH), 1, 1 << 15)
    assert 12 < (len(kernels) - 2) / FLASH.num_hidden_layers < 14


@pytest.mark.parametrize("model", MODELS)
def test_layers_of_every_kind_launch_what_all_layers_do(model: str) -> None:
    whole = standard_model(MODELS[model])
    some = whole.different_layers()
    first = dataclasses.replace(whole, layers=whole.layers[:1])
    assert len(some.layers) < 8
    for rows, kernels in ((1, step_kernels), (32, chunk_kernels), (64, chunk_kernels)):
        wanted = {kernel.name for kernel in kernels(whole, rows, 1)}
        assert {kernel.name for kernel in kernels(some, rows, 1)} == wanted
        assert {kernel.name for kernel in kernels(first, rows, 1)} != wanted


@pytest.mark.parametrize("model", MODELS)
def test_whatever_a_chunk_holds_its_kernels_are_built(model: str) -> None:
    config = few_layers(MODELS[model], 4)  # every kind
    operands = standard_model(config).different_layers()
    built = {kernel.name for kernel in all_kernels(standard_model(config))}
    least, most = prefill_plan.LEAST_ROWS, prefill_plan.MOST_ROWS
    for rows in (1, *range(least, 5 * least), *range(5 * least, most, 61), most):
        chunk = chunk_kernels(operands, rows, 1)
        missing = {kernel.name for kernel in chunk} - built
        assert not missing, f"{rows} rows"
