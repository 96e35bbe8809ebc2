"""The kernel that checks on a GPU, interpreted: it finds damage on disk and damage on the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.store.reader import PackedStore
from dsv4.kernels.ops.xxh3.contract import xxh3
from dsv4.kernels.reference.xxh3 import secret_words
from dsv4.runtime.load import Settings, check, load_weights
from dsv4.runtime.load.arena import HostArena, Slot
from dsv4.runtime.load.plan import Part
from tests.support.interpreter.run import interpret

CODES = "layers/0/ffn/experts/w2/codes/c/1/0/0"
SETTINGS = Settings(readers=2, slot_nbytes=16 << 10, verify="device")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes loads to the CPU run the kernel; chunks of each launch."""
    counts: list[int] = []
    alone = threading.Lock()  # the compiler's: two readers may have finished a wave

    def run(data: Tensor, places: Tensor, secret: Tensor, acc: Tensor) -> None:
        counts.append(len(places))
        names = ("data", "places", "secret", "acc")
        with alone:
            interpret(xxh3(), "sm_90a", dict(zip(names, (data, places, secret, acc), strict=True)))

    monkeypatch.setattr(check, "_reference", run)
    return counts


@pytest.mark.long
def test_a_whole_store_is_right(sample: PackedStore, calls: list[int]) -> None:
    report = load_weights(sample, "cpu", settings=SETTINGS).reports[0]
    assert report.verified == "device" and report.spent.verified_bytes == report.nbytes
    assert 0 < sum(calls) <= report.spent.chunks and len(calls) <= check.WAVES


def test_a_bit_that_flipped_on_disk_is_named(mutable: Path) -> None:
    store = PackedStore.open(mutable)
    raw = bytearray((mutable / CODES).read_bytes())
    raw[2 * 8192 + 77] ^= 0x40
    (mutable / CODES).write_bytes(raw)
    with pytest.raises(StoreError, match=rf"{CODES}: chunk 2 \(bytes 16384 to 24576\).*repair"):
        load_weights(store, "cpu", parts={Part.EXPERTS}, settings=SETTINGS)


def test_a_bit_that_flipped_on_the_bus_is_named(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is right, so only who hashes on the device can see it."""
    real = HostArena.copy

    def copy(arena: HostArena, slot: Slot, nbytes: int, at: int) -> None:
        real(arena, slot, nbytes, at)
        if at == 0:
            arena.bytes[0] ^= 1

    monkeypatch.setattr(HostArena, "copy", copy)
    with pytest.raises(StoreError, match=r"chunk 0 .* does not match its checksum"):
        load_weights(sample, "cpu", settings=SETTINGS)
    load_weights(sample, "cpu", settings=Settings(verify="readers"))


def test_a_bit_changes_one_digest() -> None:
    """That of the chunk it lies in."""
    data = torch.arange(4096, dtype=torch.int32).view(torch.uint8).view(-1, 4096)
    places = torch.tensor([[0, 4096], [4096, 8192], [12288, 4096]])
    secret = secret_words()
    sums = torch.empty(2, 3, 8, dtype=torch.int64)
    for turn in range(2):
        data[1, 5] ^= turn
        check._reference(data, places, secret, sums[turn])
    assert (sums[0] != sums[1]).any(1).tolist() == [False, True, False]
