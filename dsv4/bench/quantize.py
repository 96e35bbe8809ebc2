"""`dsv4 bench quantize`: how well and how fast matrices are rounded to NVFP4, beside the peers.

Quality is the relative MSE sum (w - q)^2 / sum w^2 of every method on the same bfloat16 weights.
Speed is elements per second of one process with the given threads, beside a plain copy of the same
bytes in the same run; all methods take the same matrix in turn, round by round.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.peers import (
    four_over_six,
    modelopt_rounding,
    modelopt_sweep,
    torchao_rounding,
)
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.layouts import pack_nvfp4, unpack_nvfp4
from dsv4.formats.metrics import Loss
from dsv4.formats.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.nvfp4 import dequantize_nvfp4, quantize_nvfp4

COLUMNS = 4096
AMAX = 0.75 * 2.0**-3  # 6 * 256 * 2^-14
ROUNDS = 5
WORST_ROUNDING = 1.1e-2  # relative MSE of plain amax rounding on any of the distributions
E8M0_MIDDLE = 118  # exponents of real expert weights lie well below one
E8M0_SPAN = 8

Method = Callable[[Tensor], Tensor]
"""bfloat16 `[N, K]` -> the rounded values, float32 `[N, K]`."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """Relative MSE of every method on one distribution; None where a peer is not installed."""

    distribution: str
    rel_mse: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Speed:
    """One operation: bytes in and out, seconds (median), and its rate beside a plain copy."""

    operation: str
    elements: int
    nbytes: int
    seconds: float
    copy_seconds: float
    correct: bool

    @property
    def of_copy(self) -> float:
        """Fraction of the rate at which the same bytes are copied in the same run."""
        return self.copy_seconds / self.seconds


def _ours(w: Tensor) -> Tensor:
    return dequantize_nvfp4(quantize_nvfp4(w))


METHODS: dict[str, Method] = {
    "dsv4": _ours,
    "ModelOpt rounding": modelopt_rounding,
    "ModelOpt sweep": modelopt_sweep,
    "four-over-six": four_over_six,
    "torchao": torchao_rounding,
}


def distributions(elements: int, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, bfloat16 `[N, 4096]`) of about `elements` weights each.

    Scaled so that the largest block scale is exactly 256, where published figures are taken (a
    global scale of amax / 1536). With a power of two for a global scale, where amax falls in its
    octave moves the error of light-tailed weights: uniform 6.15e-3 to 6.33e-3, Gauss by 0.2 %.
    """
    rows = max(elements // COLUMNS, 1)
    shape = torch.Size((rows, COLUMNS))
    torch_rng = torch.get_rng_state()
    torch.manual_seed(seed)
    families: dict[str, torch.distributions.Distribution] = {
        "Gauss": torch.distributions.Normal(0.0, 1.0),
        "Laplace": torch.distributions.Laplace(0.0, 1.0),
        "t(5)": torch.distributions.StudentT(5.0),
        "t(3)": torch.distributions.StudentT(3.0),
        "uniform": torch.distributions.Uniform(-1.0, 1.0),
    }
    try:
        for name, family in families.items():
            sample = family.sample(shape)
            yield name, (sample * (AMAX / sample.abs().max())).to(torch.bfloat16)
    finally:
        torch.set_rng_state(torch_rng)


def quality(elements: int) -> Iterator[Quality]:
    """Relative MSE per distribution, every method on the same weights."""
    for name, weights in distributions(elements):
        errors: dict[str, float | None] = {}
        for method, quantise in METHODS.items():
            try:
                rounded = quantise(weights)
            except ImportError:
                errors[method] = None
                continue
            loss = Loss()
            loss.add(weights.to(torch.float32), rounded)
            errors[method] = loss.rel_mse
        yield Quality(name, errors)


def speed(elements: int, threads: int) -> list[Speed]:
    """Throughput of rounding, casting and packing with `threads` torch threads."""
    if threads < 1:
        raise RuntimeRefusal(f"threads is {threads}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_time(*case) for case in _cases(elements)]
    finally:
        torch.set_num_threads(before)


def _cases(elements: int) -> Iterator[tuple[str, int, int, Callable[[], Any], bool]]:
    """-> (operation, elements, bytes in + out, what to time, whether its result is right)."""
    _, weights = next(distributions(elements))
    count = weights.numel()
    original = weights.to(torch.float32)
    for name, quantise in METHODS.items():
        if name in ("ModelOpt sweep", "four-over-six"):
            continue  # references of quality, not written for speed
        try:
            loss = Loss()
            loss.add(original, quantise(weights))
        except ImportError:
            continue
        packed_bytes = count * 2 + count // 2 + count // 16
        timed = _quantise_only(name, weights)
        yield f"round, {name}", count, packed_bytes, timed, loss.rel_mse < WORST_ROUNDING
    yield from _exact_cases(count)


def _quantise_only(name: str, weights: Tensor) -> Callable[[], Any]:
    if name == "dsv4":
        return lambda: quantize_nvfp4(weights)
    if name == "torchao":
        return lambda: torchao_rounding(weights, dequantise=False)
    return lambda: modelopt_rounding(weights, dequantise=False)


def _exact_cases(count: int) -> Iterator[tuple[str, int, int, Callable[[], Any], bool]]:
    """Carrying experts: the cast and the layout of w13 and of w2, together and apart."""
    rng = torch.Generator().manual_seed(0)
    rows = count // COLUMNS
    codes = torch.randint(256, (rows, COLUMNS // 2), generator=rng, dtype=torch.uint8)
    exponents = torch.randint(E8M0_SPAN, (rows, COLUMNS // 32), generator=rng) + E8M0_MIDDLE
    scales = exponents.to(torch.uint8)
    tensor, report = cast_mxfp4_to_nvfp4(codes, scales, name="bench")
    exact = report.exact and torch.equal(tensor.codes, codes)
    touched = codes.nbytes + scales.nbytes + tensor.scales.nbytes  # the codes are handed on
    yield (
        "exact cast MXFP4 -> NVFP4",
        count,
        touched,
        lambda: cast_mxfp4_to_nvfp4(codes, scales, name="bench"),
        exact,
    )
    packed = tensor.codes.nbytes + tensor.scales.nbytes
    for what, parts, arguments in (
        ("w13: gate and up interleaved by 8", 2, {"interleave": 8}),
        ("w2: 8 slabs", 1, {"slabs": 8}),
    ):
        tensors = [tensor] * parts
        back = unpack_nvfp4(pack_nvfp4(tensors, **arguments))
        right = all(
            torch.equal(part.codes, tensor.codes) and torch.equal(part.scales, tensor.scales)
            for part in back
        )
        moved = packed + codes.nbytes + scales.nbytes
        carry = _carrier(codes, scales, parts, arguments)
        yield f"cast and layout, {what}", count * parts, moved * parts, carry, right and exact
        arrange = _packer(tensors, arguments)
        yield f"layout, {what}", count * parts, 2 * packed * parts, arrange, right


def _carrier(
    codes: Tensor, scales: Tensor, parts: int, arguments: dict[str, int]
) -> Callable[[], Any]:
    def carry() -> Any:
        cast = [cast_mxfp4_to_nvfp4(codes, scales, name="bench")[0] for _ in range(parts)]
        return pack_nvfp4(cast, **arguments)

    return carry


def _packer(parts: list[Any], arguments: dict[str, int]) -> Callable[[], Any]:
    return lambda: pack_nvfp4(parts, **arguments)


def _time(
    operation: str, elements: int, nbytes: int, run: Callable[[], Any], correct: bool
) -> Speed:
    """Time the operation and a copy of as many bytes, both into fresh memory, in turn."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8)
    taken: list[float] = []
    copied: list[float] = []
    run()
    for _ in range(ROUNDS):
        copied.append(_seconds(source.clone))
        taken.append(_seconds(run))
    return Speed(
        operation, elements, nbytes, statistics.median(taken), statistics.median(copied), correct
    )


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
