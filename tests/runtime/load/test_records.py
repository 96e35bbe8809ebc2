"""Experts loaded to two memories: the store's bytes, whole or not at all; nothing stays pinned."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import OutOfSpaceError, RuntimeRefusal, StoreError
from dsv4.formats.model.releases import FLASH
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.ops.experts.reference import record_parts
from dsv4.runtime import cuda_driver
from dsv4.runtime.load import Part, Settings, load_weights, records
from dsv4.runtime.load import arena as arenas
from dsv4.runtime.load.placement import Placement
from dsv4.runtime.load.records import LoadedRecords, load_records, plan_records, record_of
from dsv4.synthetic.store import make_store
from tests.support.emulated_driver import EmulatedCuda

CONFIG = dataclasses.replace(
    FLASH,
    vocab_size=512,
    hidden_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=128,
    o_lora_rank=128,
    o_groups=2,
    moe_intermediate_size=2048,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128),
)
CPU = torch.device("cpu")
HOT = np.random.default_rng(2).random((3, 8)) < 0.5
PLACEMENT = Placement(HOT, 2 * int((~HOT).sum(1).max()))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("records") / "store", CONFIG).path


@pytest.fixture(scope="module")
def store(path: Path) -> PackedStore:
    return PackedStore.open(path)


def load(
    store: PackedStore, cuda: EmulatedCuda, patch: pytest.MonkeyPatch, **how: Any
) -> LoadedRecords:
    patch.setattr(cuda_driver, "_libraries", lambda: (cuda, cuda))
    settings = Settings(readers=2, slot_nbytes=64 << 10, **how)
    return load_records(store, PLACEMENT, CPU, settings, cuda_driver.Driver)


def same(record: Tensor, store: PackedStore, layer: int, expert: int) -> bool:
    own = store.experts(f"layers.{layer}.ffn.experts")
    shape = record_of(store)
    for name, kept in (("13", own.w13(expert)), ("2", own.w2(expert))):
        codes, scales = record_parts(shape, record[None], name)
        kept_scales = kept.scales.view(torch.uint8)  # type: ignore[union-attr]
        if not torch.equal(codes[0], kept.codes):  # type: ignore[union-attr]
            return False
        if not torch.equal(scales[0].reshape(-1), kept_scales.reshape(-1)):
            return False
    return True


@pytest.mark.parametrize("verify", ["readers", "device", "off"])
def test_both_memories_hold_the_stores_bytes(
    store: PackedStore, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    cuda = EmulatedCuda()
    found = load(store, cuda, monkeypatch, verify=verify)
    places, rows = PLACEMENT.places(), PLACEMENT.host_rows()
    for layer in range(3):
        for expert in range(8):
            hot = places[layer, expert] >= 0
            memory, row = (found.device, places) if hot else (found.host, rows)
            assert same(memory[row[layer, expert]], store, layer, expert)
    assert not same(found.host[0], store, *np.argwhere(HOT)[0].tolist()), "it is told apart"
    # Pinned layer by layer, all of host memory, as long as somebody holds it.
    layers = int((~HOT).any(1).sum())
    assert len(cuda.pinned) == layers and sum(cuda.pinned.values()) == found.host.nbytes
    assert found.host_address == found.host.data_ptr()
    reports = [report.verified for report in found.reports]
    assert reports == [verify, "off" if verify == "off" else "readers"]
    if verify != "off":
        nbytes = sum(report.spent.verified_bytes for report in found.reports)
        assert nbytes == 24 * record_of(store).nbytes
    del found
    assert not cuda.pinned


FAULTS = ("no pinning", "pinning ends", "short read", "bad checksum", "no memory", "interrupted")


@pytest.mark.parametrize("fault", FAULTS)
def test_after_an_error_nothing_is_pinned(
    path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cuda = PackedStore.open(path), EmulatedCuda()
    wanted: tuple[type[BaseException], str | None] = (StoreError, None)
    right = os.preadv
    cold = PLACEMENT.cold * record_of(store).nbytes
    match fault:
        case "no pinning":
            cuda = EmulatedCuda(failing={"cuMemHostRegister_v2": 801})
            wanted = OutOfSpaceError, r"pinning .* failed after 0.*error 801; free memory"
        case "pinning ends":
            cuda = EmulatedCuda(pin_limit=cold - 1)
            wanted = OutOfSpaceError, r"pinning .* failed after \d.*error 2; .*--experts"
        case "short read":
            monkeypatch.setattr(os, "preadv", lambda f, m, at: 0)
            wanted = StoreError, "it ends at byte"
        case "bad checksum":

            def flipped(descriptor: int, memory: list[memoryview], at: int) -> int:
                count = right(descriptor, memory, at)
                memory[0][7] ^= 4
                return count

            monkeypatch.setattr(os, "preadv", flipped)
            wanted = StoreError, "does not match its checksum; `dsv4 repair`"
        case "no memory":
            monkeypatch.setattr(arenas, "free_memory", lambda device: (cold, "this machine"))
            wanted = OutOfSpaceError, "experts in host memory need .* this machine has"
        case _:

            def interrupted(*given: object) -> int:
                raise KeyboardInterrupt

            monkeypatch.setattr(records, "fill", interrupted)
            wanted = KeyboardInterrupt, None
    with pytest.raises(wanted[0], match=wanted[1]):
        load(store, cuda, monkeypatch)
    assert not cuda.pinned and not cuda.events


def test_the_core_is_loaded_without_what_lies_in_records(store: PackedStore) -> None:
    parts = {Part.CORE, Part.EXPERTS}
    whole = load_weights(store, CPU, parts=parts)
    core = load_weights(store, CPU, parts=parts, records=True)
    less = whole.reports[0].nbytes - core.reports[0].nbytes
    assert less == 24 * record_of(store).nbytes
    path = "layers/1/ffn/experts/w13/global_scale"
    assert torch.equal(core.array(path).tensor(), whole.array(path).tensor())
    with pytest.raises(StoreError, match="is not loaded"):
        core.array("layers/1/ffn/experts/w13/codes")


def test_plans_cover_every_byte_once(store: PackedStore) -> None:
    hot = plan_records(store, HOT, PLACEMENT.records)
    cold = plan_records(store, ~HOT, PLACEMENT.cold)
    seen: dict[str, list[tuple[int, int]]] = {}
    for plan in (hot, cold):
        at = 0
        for span in plan.spans():
            assert span.at == at
            at += span.nbytes
            seen.setdefault(span.file.key, []).append((span.begin, span.end))
        assert at <= plan.nbytes
    for key, ranges in seen.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        assert [begin for begin, _ in sorted(ranges)] == ends[:-1], key


def test_experts_that_no_kernel_reads_are_refused(standard_store: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeRefusal, match=r"experts/w2 has \d slabs"):
        record_of(PackedStore.open(standard_store))
