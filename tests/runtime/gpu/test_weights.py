"""A loaded store's arrays are the kernels' operands; what no kernel reads is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dsv4.bench.decode import few_layers
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.releases import FLASH, MODELS
from dsv4.formats.numeric.operands import Fp8Matrix, Nvfp4Matrix
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.ops.gemv.contract import Weight, weights_of
from dsv4.runtime.gpu import plan, prefill_plan
from dsv4.runtime.gpu.attention_plan import LayerWeights
from dsv4.runtime.gpu.weights import Loaded, Operands
from dsv4.runtime.load import Part, load_weights


@pytest.fixture(scope="module")
def store(standard_store: Path) -> PackedStore:
    return PackedStore.open(standard_store)


@pytest.fixture(scope="module")
def loaded(store: PackedStore) -> Loaded:
    return Loaded(load_weights(store, "cpu", parts={Part.CORE, Part.EXPERTS}))


def test_stacks_hold_every_experts_bytes(store: PackedStore, loaded: Loaded) -> None:
    for layer in range(store.config.num_hidden_layers):
        prefix = f"layers.{layer}.ffn.experts"
        w13, w2 = loaded.stacks(prefix)
        assert len(w13) == len(w2) == store.config.n_routed_experts
        for expert in range(len(w13)):
            for found, kept in (
                (w13.matrix(expert), store.experts(prefix).w13(expert)),
                (w2.matrix(expert), store.experts(prefix).w2(expert)),
            ):
                assert isinstance(kept, Nvfp4Matrix)
                assert torch.equal(found.codes, kept.codes)
                assert torch.equal(found.scales.view(torch.uint8), kept.scales.view(torch.uint8))
                assert torch.equal(found.global_scales, kept.global_scales)
                assert (found.rows, found.cols, found.interleave) == (
                    kept.rows,
                    kept.cols,
                    kept.interleave,
                )


def test_matrices_are_views_of_the_arena(store: PackedStore, loaded: Loaded) -> None:
    name = "layers.0.attn.wq_b.weight"
    found, kept = loaded.matrix(name), store.matrix(name)
    assert isinstance(found, Fp8Matrix) and isinstance(kept, Fp8Matrix)
    assert torch.equal(found.codes.view(torch.uint8), kept.codes.view(torch.uint8))
    assert found.codes.data_ptr() == loaded.matrix(name).codes.data_ptr()  # type: ignore[union-attr]


def test_a_stack_that_no_kernel_reads_is_refused(loaded: Loaded) -> None:
    """The tiny model's inner dimension is too small for eight slabs."""
    with pytest.raises(RuntimeRefusal, match=r"layers\.0\.ffn\.experts\.w2 has \d slabs"):
        Operands(loaded)


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_reads_what_recipe_standard_stores(model: str) -> None:
    config = MODELS[model]
    layers, head = plan.standard_weights(config)
    assert head == Weight("nvfp4", config.vocab_size, config.hidden_size)
    known = {weight for group in weights_of(config).values() for weight in group}
    used = {weight for own in layers.values() for weight in own.values()} - {
        own["ffn.gate"] for own in layers.values()
    }
    assert used | {head} == known
    names = [kernel.name for kernel in plan.kernels(config)]
    assert len(set(names)) < 60 < len(names)


def test_a_step_is_thirteen_launches_a_layer() -> None:
    layers, head = plan.standard_weights(FLASH)
    launches = list(plan.step_launches(FLASH, layers, head, 1, 1 << 15))
    by_layer = (len(launches) - 2) / FLASH.num_hidden_layers
    assert 12 < by_layer < 14


@pytest.mark.parametrize("model", MODELS)
def test_layers_of_every_kind_launch_what_all_layers_do(model: str) -> None:
    config = MODELS[model]
    layers, head = plan.standard_weights(config)
    some = plan.different_layers(config, layers)
    assert len(some) < 8
    for rows in (1, 32, 64):

        def kernels(own: Mapping[int, LayerWeights], rows: int = rows) -> set[str]:
            if rows == 1:
                launches = plan.step_launches(config, own, head, rows, 1)
            else:
                launches = prefill_plan.chunk_launches(config, own, rows, 1)
            return {launch.kernel.name for launch in launches}

        assert kernels(some) == kernels(layers)
        assert kernels({0: layers[0]}) != kernels(layers)


@pytest.mark.parametrize("model", MODELS)
def test_whatever_a_chunk_holds_its_kernels_are_built(model: str) -> None:
    config = few_layers(MODELS[model], 4)  # every kind
    layers, _ = plan.standard_weights(config)
    built = {kernel.name for kernel in prefill_plan.kernels(config)}
    least, most = prefill_plan.LEAST_ROWS, prefill_plan.MOST_ROWS
    for rows in (*range(least, 5 * least), *range(5 * least, most, 61), most):
        chunk = prefill_plan.chunk_launches(config, layers, rows, 1)
        missing = {launch.kernel.name for launch in chunk} - built
        assert not missing, f"{rows} rows"
