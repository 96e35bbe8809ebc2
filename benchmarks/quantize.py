"""`python -m benchmarks quantize`: how well and how fast matrices are rounded, beside the peers.

Quality is the relative MSE sum (w - q)^2 / sum w^2 of every method on the same bfloat16 weights.
Speed is elements per second of one process with the given threads, beside a plain copy of as many
bytes, the two taking turns in the same run. It is measured twice. From memory: operation and copy
each go round so many inputs, and keep so many results, that neither is found in a cache; so a
conversion meets its experts. In cache: both see one input over and over, and drop the result; what
does not fit the cache comes from memory here too.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import (
    BLOCK,
    E4M3_MAX,
    four_over_six,
    least_errors,
    modelopt_rounding,
    modelopt_sweep,
    torchao_rounding,
)
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.codecs import E2M1_MAX, dequantize_mxfp4
from dsv4.formats.numeric.layouts import pack_nvfp4, unpack_nvfp4
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
from dsv4.formats.numeric.operands import Nvfp4Matrix

COLUMNS = 4096
AMAX = 0.75 * 2.0**-3  # 6 * 256 * 2^-14
ROUNDS = 5
TURNS = 31
COLD_BYTES = 1 << 27  # several times the cache that a core has a share of
EXPERTS = {
    "Flash": (2048, 4096),
    "Pro": (3072, 7168),
}  # rows and columns of w1 and w3; w2 is [K, N]
WORST_ROUNDING = 1.1e-2  # relative MSE of plain amax rounding on any of the distributions
SAMPLED_BLOCKS = 1 << 15
E8M0_MIDDLE = 118  # exponents of real expert weights lie well below one
E8M0_SPAN = 8

Method = Callable[[Tensor], Tensor]
"""bfloat16 `[N, K]` -> the rounded values, float32 `[N, K]`."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """One method on one distribution: relative MSE over the seeds, and how far from the least.

    `excess` is the squared error on sampled blocks over the least that any of the 126 scales per
    block gives at the method's own global scale, less one: 0 at the optimum.
    """

    mean: float
    standard_error: float | None
    least: float
    largest: float
    excess: float

    @classmethod
    def of(cls, rel_mse: Sequence[float], excess: float) -> Spread:
        """The spread of one relative MSE per seed; a single seed has no standard error."""
        several = len(rel_mse) > 1
        error = statistics.stdev(rel_mse) / len(rel_mse) ** 0.5 if several else None
        return cls(statistics.fmean(rel_mse), error, min(rel_mse), max(rel_mse), excess)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Every method on the same weights of one distribution; None: the peer is not installed."""

    distribution: str
    methods: dict[str, Spread | None]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of an operation, and its rate as a fraction of a plain copy's."""

    seconds: float
    of_copy: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """One operation on `elements` weights, `nbytes` in + out.

    `from_memory` is None for rounding: arithmetic takes a hundred times as long as the bytes.
    """

    operation: str
    elements: int
    nbytes: int
    from_memory: Timing | None
    in_cache: Timing
    correct: bool


@dataclasses.dataclass(frozen=True)
class _Case:
    """What to time: `run(fresh())`, where `fresh` makes equal inputs in memory of their own."""

    operation: str
    elements: int
    nbytes: int
    fresh: Callable[[], Any]
    run: Callable[[Any], Any]
    correct: bool


def _ours(w: Tensor) -> Tensor:
    return dequantize_nvfp4(quantize_nvfp4(w))


METHODS: dict[str, Method] = {
    "dsv4": _ours,
    "ModelOpt rounding": modelopt_rounding,
    "ModelOpt sweep": modelopt_sweep,
    "four-over-six": four_over_six,
    "torchao": torchao_rounding,
}
QUANTISERS: dict[str, Callable[[Tensor], Any]] = {
    "dsv4": quantize_nvfp4,
    "ModelOpt rounding": functools.partial(modelopt_rounding, dequantise=False),
    "torchao": functools.partial(torchao_rounding, dequantise=False),
}
"""Those timed: bfloat16 `[N, K]` -> packed, without going back to values."""

LARGEST_SCALES = {"dsv4": 256.0, "four-over-six": 256.0}  # the others': 448, all E4M3 has


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


def quality(elements: int, seeds: int = 1) -> list[Quality]:
    """Relative MSE per distribution over seeds 0, 1, ...: every method on the same weights."""
    if seeds < 1:
        raise RuntimeRefusal(f"seeds is {seeds}, expected at least 1")
    found: dict[str, dict[str, list[_Errors] | None]] = {}
    for seed in range(seeds):
        for name, weights in distributions(elements, seed):
            methods = found.setdefault(name, {method: [] for method in METHODS})
            for method, errors in zip(METHODS, _errors(weights), strict=True):
                so_far = methods[method]
                if errors is None or so_far is None:
                    methods[method] = None
                else:
                    so_far.append(errors)
    return [
        Quality(
            name,
            {
                method: None if errors is None else _spread(errors)
                for method, errors in methods.items()
            },
        )
        for name, methods in found.items()
    ]


@dataclasses.dataclass(frozen=True)
class _Errors:
    """Relative MSE of all weights; squared error of the sampled blocks, and the least possible."""

    rel_mse: float
    sampled: float
    least: float


def _spread(errors: list[_Errors]) -> Spread:
    excess = sum(e.sampled for e in errors) / sum(e.least for e in errors) - 1.0
    return Spread.of([e.rel_mse for e in errors], excess)


def _errors(weights: Tensor) -> Iterator[_Errors | None]:
    """Of each method in turn, None where a peer is not installed."""
    original = weights.to(torch.float32)
    amax = original.abs().amax()
    blocks = _sampled(original)
    least: dict[float, float] = {}
    for method, quantise in METHODS.items():
        try:
            rounded = quantise(weights)
        except ImportError:
            yield None
            continue
        largest = LARGEST_SCALES.get(method, E4M3_MAX)
        if largest not in least:
            least[largest] = float(least_errors(blocks, amax / (E2M1_MAX * largest)).sum())
        loss, sampled = Loss(), Loss()
        loss.add(original, rounded)
        sampled.add(blocks, _sampled(rounded))
        yield _Errors(loss.rel_mse, sampled.errors, least[largest])


def _sampled(w: Tensor) -> Tensor:
    """About `SAMPLED_BLOCKS` blocks `[B, 16]`, evenly from all over `w`."""
    blocks = w.reshape(-1, BLOCK)
    return blocks[:: max(1, len(blocks) // SAMPLED_BLOCKS)]


def speed(elements: int, threads: int) -> list[Speed]:
    """Throughput of rounding, casting and packing with `threads` torch threads."""
    if threads < 1:
        raise RuntimeRefusal(f"threads is {threads}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounding = [_time(case, cold=False) for case in _rounding_cases(elements)]
        return rounding + [_time(case, cold=True) for case in _carrying_cases()]
    finally:
        torch.set_num_threads(before)


def _carrying_cases() -> Iterator[_Case]:
    for model, (intermediate, hidden) in EXPERTS.items():
        yield from _expert_cases(f"{model} w13", (intermediate, hidden), {"interleave": 8})
        yield from _expert_cases(f"{model} w2", (hidden, intermediate), {"slabs": 8})


def _rounding_cases(elements: int) -> Iterator[_Case]:
    _, weights = next(distributions(elements))
    count = weights.numel()
    original = weights.to(torch.float32)
    for name, quantise in QUANTISERS.items():
        try:
            loss = Loss()
            loss.add(original, METHODS[name](weights))
        except ImportError:
            continue
        packed_bytes = count * 2 + count // 2 + count // 16
        right = loss.rel_mse < WORST_ROUNDING
        yield _Case(f"round, {name}", count, packed_bytes, weights.clone, quantise, right)


def _expert_cases(what: str, shape: tuple[int, int], arguments: dict[str, int]) -> Iterator[_Case]:
    """The cast of w2, or of gate and up, the layout, and the one after the other.

    The cast hands the codes on and looks at one block. Its rate is given with them, counted once,
    and by the scales alone, which is all that it reads and writes.
    """
    rng = torch.Generator().manual_seed(0)
    sources = [_mxfp4(shape, rng) for _ in range(2 if "interleave" in arguments else 1)]
    casts = [cast_mxfp4_to_nvfp4(*source, name="bench") for source in sources]
    exact = all(
        report.exact and torch.equal(dequantize_nvfp4(cast), dequantize_mxfp4(*source))
        for source, (cast, report) in zip(sources, casts, strict=True)
    )
    parts = [dataclasses.replace(cast, codes=cast.codes.clone()) for cast, _ in casts]
    packed = pack_nvfp4(parts, **arguments)
    right = all(
        torch.equal(back.codes, part.codes) and torch.equal(back.scales, part.scales)
        for back, part in zip(unpack_nvfp4(packed), parts, strict=True)
    )
    count = shape[0] * shape[1] * len(parts)
    codes, fine, coarse = count // 2, count // 16, count // 32

    def cast_all(inputs: list[tuple[Tensor, Tensor]]) -> list[NVFP4Tensor]:
        return [cast_mxfp4_to_nvfp4(*source, name="bench")[0] for source in inputs]

    def arrange(inputs: list[NVFP4Tensor]) -> Nvfp4Matrix:
        return pack_nvfp4(inputs, **arguments)

    def carry(inputs: list[tuple[Tensor, Tensor]]) -> Nvfp4Matrix:
        return arrange(cast_all(inputs))

    def fresh_sources() -> list[tuple[Tensor, Tensor]]:
        return copy.deepcopy(sources)

    def fresh_scales() -> list[tuple[Tensor, Tensor]]:
        return [(codes, scales.clone()) for codes, scales in sources]

    def fresh_parts() -> list[NVFP4Tensor]:
        return copy.deepcopy(parts)

    scales = coarse + fine
    for operation, nbytes, fresh, run, correct in (
        ("exact cast", codes + scales, fresh_sources, cast_all, exact),
        ("exact cast, scales alone", scales, fresh_scales, cast_all, exact),
        ("layout", 2 * (codes + fine), fresh_parts, arrange, right),
        ("cast and layout", 2 * codes + scales, fresh_sources, carry, right and exact),
    ):
        yield _Case(f"{what}, {operation}", count, nbytes, fresh, run, correct)


def _mxfp4(shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random codes uint8 `[N, K/2]` with E8M0 scales uint8 `[N, K/32]` as experts have them."""
    rows, cols = shape
    codes = torch.randint(256, (rows, cols // 2), generator=rng, dtype=torch.uint8)
    exponents = torch.randint(E8M0_SPAN, (rows, cols // 32), generator=rng) + E8M0_MIDDLE
    return codes, exponents.to(torch.uint8)


def _time(case: _Case, *, cold: bool) -> Speed:
    """Time a case and a copy of as many bytes, taking turns."""
    source = torch.ones(case.nbytes // 2, dtype=torch.uint8)  # read once and written once
    turns = TURNS if cold else ROUNDS
    in_cache = _medians(case.run, [case.fresh()], [source], keep=0, turns=turns)
    from_memory = None
    if cold:
        around = -(-COLD_BYTES // case.nbytes)
        inputs = [case.fresh() for _ in range(around)]
        sources = [source.clone() for _ in range(around)]
        from_memory = _medians(case.run, inputs, sources, keep=around, turns=turns)
    return Speed(case.operation, case.elements, case.nbytes, from_memory, in_cache, case.correct)


def _medians(
    run: Callable[[Any], Any], inputs: list[Any], sources: list[Tensor], *, keep: int, turns: int
) -> Timing:
    """Time `run` and cloning a source, the last `keep` results of each alive.

    Twice as many turns go first: by then the allocator has all the memory that it will need.
    """
    lanes = [
        (call, given, collections.deque[Any](maxlen=keep), list[float]())
        for call, given in ((run, inputs), (torch.clone, sources))
    ]
    for turn in range(2 * keep + 1 + turns):
        for call, given, results, seconds in lanes:
            begin = time.perf_counter()
            result = call(given[turn % len(given)])
            seconds.append(time.perf_counter() - begin)
            results.append(result)
            del result
    taken, copied = (statistics.median(seconds[2 * keep + 1 :]) for *_, seconds in lanes)
    return Timing(taken, copied / taken)
