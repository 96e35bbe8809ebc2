"""Checksums of chunks that lie on the device: what a store's chunks are compared with after a load.

Reference: `dsv4.kernels.reference.xxh3`; integers, so the tolerance is zero. The kernel leaves
eight accumulators a chunk, which `digests` folds for all chunks at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.reference.xxh3 import BLOCK_BYTES, LANES, accumulators, secret_words

OPERATION = "xxh3"
MODULE = "dsv4.kernels.ops.xxh3.kernel"
LINE_BYTES = 4096  # the arena as lines: their number stays below 2^31


def xxh3() -> Kernel:
    """Arguments: data uint8 `[lines, 4096]`; places int64 `[C, 2]`, first byte and length of each
    chunk, multiples of 16 and of 1024; secret int64 `[32]`; acc int64 `[C, 8]`.
    """
    arguments = (
        Argument("data", torch.uint8, ("lines", LINE_BYTES)),
        Argument("places", torch.int64, ("chunks", 2)),
        Argument("secret", torch.int64, (32,)),
        Argument("acc", torch.int64, ("chunks", LANES), "out"),
    )
    return kernel(OPERATION, f"{MODULE}:Xxh3", {}, arguments)


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The chunks of one layer's experts, w13 codes and scales; rows do not matter."""
    c = config
    codes = 2 * c.moe_intermediate_size * c.hidden_size // 2 // 8
    yield case([codes] * 8 * 64, "codes of 64 experts", model)
    yield case([codes // 8] * 8 * 64, "scales of 64 experts", model)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Chunks of one block, of a turn of the kernel, of one block more, and of several turns."""
    yield case([1024, 65536, 66560, 3072, 140 * 1024], "turns", model)


def case(sizes: Sequence[int], shape: str, model: str) -> Case:
    """Chunks of `sizes` bytes, one behind the other in multiples of 1024."""
    begins = list(itertools.accumulate(sizes, initial=0))
    lines = -(-begins[-1] // LINE_BYTES)

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        data = torch.randint(
            256, (lines, LINE_BYTES), generator=rng, device=device, dtype=torch.uint8
        )
        places = [list(place) for place in zip(begins[:-1], sizes, strict=True)]
        return {
            "data": data,
            "places": torch.tensor(places, device=device),
            "secret": secret_words(device),
            "acc": torch.empty(len(sizes), LANES, dtype=torch.int64, device=device),
        }

    def expect(buffers: Buffers) -> dict[str, Expected]:
        flat = buffers["data"].view(-1)
        value = torch.empty_like(buffers["acc"])
        for length in sorted(set(sizes)):
            which = [index for index, one in enumerate(sizes) if one == length]
            chunks = torch.stack([flat[begins[i] : begins[i] + length] for i in which])
            value[which] = accumulators(chunks)
        return {"acc": Expected(value)}

    if any(size % BLOCK_BYTES or not size for size in sizes):
        raise ValueError(f"chunks of {sorted(set(sizes))} bytes, expected multiples of 1024")
    nbytes = sum(sizes) + len(sizes) * 8 * LANES
    return Case(OPERATION, shape, model, 1, (Launch(xxh3()),), nbytes, make, expect, ("data",))
