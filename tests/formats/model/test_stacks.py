"""Stacks of FP8 and unquantised experts in the store: what is served, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import dsv4
from dsv4.formats.errors import StoreError
from dsv4.formats.numeric.operands import Fp8Matrix
from dsv4.formats.store.nodes import read_contents
from tests.formats.model.conftest import SMALL, FlavourStore

STACK = "layers.1.ffn.experts"
W13 = "layers/1/ffn/experts/w13"


def test_fp8_experts_are_served_with_w1_before_w3(flavour_store: FlavourStore) -> None:
    packed = dsv4.open(flavour_store("base", "native"))
    experts = packed.store.experts(STACK)
    assert (len(experts), experts.interleave) == (SMALL.n_routed_experts, 0)
    w13 = experts.w13(2)
    assert isinstance(w13, Fp8Matrix)
    assert (w13.rows, w13.cols, w13.scales.dtype) == (256, 256, torch.float32)
    gate = packed.stored(f"{STACK}.2.w1.weight")
    up = packed.stored(f"{STACK}.2.w3.weight")
    assert isinstance(gate, Fp8Matrix)
    assert isinstance(up, Fp8Matrix)
    both = torch.cat([gate.codes[0].view(torch.uint8), up.codes[0].view(torch.uint8)])
    assert torch.equal(both, w13.codes[0].view(torch.uint8))


def test_plain_experts_are_served_interleaved(flavour_store: FlavourStore) -> None:
    packed = dsv4.open(flavour_store("bf16", "native"))
    experts = packed.store.experts(STACK)
    w13 = experts.w13(2)
    assert isinstance(w13, torch.Tensor)
    assert (w13.dtype, tuple(w13.shape), experts.interleave) == (torch.bfloat16, (256, 256), 8)
    gate, up = (packed.dequantize(f"{STACK}.2.{p}.weight") for p in ("w1", "w3"))
    assert torch.equal(w13[:8].float(), gate[:8])
    assert torch.equal(w13[8:16].float(), up[:8])
    assert torch.equal(w13[16:24].float(), gate[8:16])


@pytest.mark.parametrize("flavour", ["base", "bf16"])
def test_zarr_reads_them_and_their_origin_is_known(
    flavour: str, flavour_store: FlavourStore
) -> None:
    store = flavour_store(flavour, "native")
    packed = dsv4.open(store)
    group = packed.store.contents.stacks[W13]
    array = zarr.open_group(store, mode="r")[f"{W13}/{group.weights}"]
    assert isinstance(array, zarr.Array)
    ours = packed.store.array(f"{W13}/{group.weights}").tensor()
    raw = ours.view(torch.uint16 if flavour == "bf16" else torch.uint8)
    assert np.array_equal(np.asarray(array[...]), raw.numpy())
    provenance = packed.provenance(f"{STACK}.3.w3.weight")
    assert provenance["exact"] is True
    assert provenance["sources"].keys() == (
        {"weight", "scale"} if flavour == "base" else {"weight"}
    )
    size = provenance["sources"]["weight"]["end"] - provenance["sources"]["weight"]["begin"]
    assert size == 128 * 256 * (1 if flavour == "base" else 2)


def _set(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda own: own.update(fields)


@pytest.mark.parametrize(
    ("flavour", "change", "sentence"),
    [
        ("base", _set(parameters={"slabs": 1, "interleave": 8}), "no interleave"),
        ("base", _set(shape=[64, 256]), "multiples of 128 rows"),
        ("base", _set(format="plain", layout="plain"), "interleave 0 with 2 names"),
        ("bf16", _set(parameters={"slabs": 1, "interleave": 0}), "interleave 0 with 2 names"),
        ("bf16", _set(parameters={"slabs": 1, "interleave": 7}), "do not divide into runs of 7"),
        ("bf16", _set(parameters={"slabs": 2, "interleave": 8}), "expected 2"),
        ("bf16", _set(shape=[128, 128]), "expected bfloat16 or float32"),
        ("bf16", _set(format="fp8", layout="fp8.block128"), "no interleave"),
        ("bf16", _set(layout="fp8.block128"), "is unknown"),
    ],
)
def test_contradictions_are_refused(
    flavour: str,
    change: Callable[[dict[str, Any]], None],
    sentence: str,
    flavour_store: FlavourStore,
) -> None:
    hierarchy = dsv4.open(flavour_store(flavour, "native")).store.hierarchy
    groups = copy.deepcopy({path: dict(own) for path, own in hierarchy.groups.items()})
    read_contents(dataclasses.replace(hierarchy, groups=groups))
    change(groups[W13]["dsv4"])
    with pytest.raises(StoreError, match=sentence):
        read_contents(dataclasses.replace(hierarchy, groups=groups))
