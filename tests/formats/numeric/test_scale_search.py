"""The block-scale search against brute force over all 126 scales, and the proof of its window."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dsv4.formats.numeric.scale_search import ONE_BYTE, BlockEncoder
from tests.formats.numeric.judges import brute_force_errors, ml_e2m1, ml_e4m3, nibbles

GRID = [Fraction(x) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
WINDOW = range(-3, 8)


def random_blocks(kind: str, count: int, low: float, high: float, seed: int = 0) -> Tensor:
    """Blocks `[count, 16]` whose largest magnitudes spread over [6 * 2^low, 6 * 2^high]."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, 16, generator=generator)
    x = {
        "gauss": torch.randn(count, 16, generator=generator),
        "heavy": torch.tan((uniform - 0.5) * 3.0),
        "uniform": uniform - 0.5,
        "codes": (torch.randint(-12, 13, (count, 16), generator=generator) / 2),
        "one value": torch.eye(16)[torch.randint(0, 16, (count,), generator=generator)],
    }[kind]
    octave = torch.rand(count, 1, generator=generator) * (high - low) + low
    amax = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
    return x / amax * 6.0 * octave.exp2()


def emitted_errors(
    blocks: Tensor, codes: Tensor, scales: Tensor, importance: Tensor | None = None
) -> Tensor:
    values = ml_e2m1(nibbles(codes)) * ml_e4m3(scales).unsqueeze(1)
    weights = 1.0 if importance is None else importance.double()
    return ((values - blocks.double()).square() * weights).sum(dim=1)


def no_worse(found: Tensor, best: Tensor, energy: Tensor) -> bool:
    """Whether errors equal the best but for float32: quotients rounded to 2^-24 of themselves,
    and errors compared in 19 bits."""
    bound = best.sqrt() * (1 + 2.0**-19) + 2 * 2.0**-24 * energy.sqrt()
    return bool((found.sqrt() <= bound).all())


def encode(blocks: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    lanes = None if importance is None else importance.t().contiguous()
    return BlockEncoder(len(blocks)).encode(blocks.t().contiguous(), lanes)


COUNT = 1000
KINDS = ["gauss", "heavy", "uniform", "codes", "one value"]
# Octaves of amax / 6: ordinary, near saturation, among the subnormal scales, below all of them.
OCTAVES = [(-4.0, 6.0), (7.0, 8.0), (-10.0, -4.0), (-14.0, -8.0)]


@pytest.mark.parametrize("octaves", OCTAVES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_has_less_error(kind: str, octaves: tuple[float, float]) -> None:
    blocks = random_blocks(kind, COUNT, *octaves)
    codes, scales = encode(blocks)
    best = brute_force_errors(blocks).amin(dim=1)
    found = emitted_errors(blocks, codes, scales)
    assert no_worse(found, best, blocks.double().square().sum(dim=1))


@pytest.mark.parametrize("octaves", OCTAVES)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_no_scale_has_less_weighted_error(spread: float, octaves: tuple[float, float]) -> None:
    blocks = random_blocks("heavy", COUNT, *octaves)
    generator = torch.Generator().manual_seed(3)
    importance = (torch.randn(COUNT, 16, generator=generator) * spread).exp()
    importance[torch.rand(COUNT, 16, generator=generator) < 0.1] = 0.0
    importance /= importance.amax(dim=1, keepdim=True)
    codes, scales = encode(blocks, importance)
    best = brute_force_errors(blocks, importance).amin(dim=1)
    found = emitted_errors(blocks, codes, scales, importance)
    assert no_worse(found, best, (blocks.double().square() * importance).sum(dim=1))


def test_a_narrower_search_is_caught() -> None:
    """The check above is one that amax scaling (offset 0 alone) does not pass."""
    blocks = random_blocks("gauss", COUNT, -4.0, 6.0)
    errors, energy = brute_force_errors(blocks), blocks.double().square().sum(dim=1)
    start = (blocks.abs().amax(dim=1) / 6).to(torch.float8_e4m3fn).view(torch.uint8).long()
    at_start = errors.gather(1, start.unsqueeze(1) - 1).squeeze(1)
    assert not no_worse(at_start, errors.amin(dim=1), energy)


def test_every_scale_is_a_positive_finite_number() -> None:
    for kind, octaves in itertools.product(KINDS, OCTAVES):
        scales = encode(random_blocks(kind, 500, *octaves))[1]
        assert int(scales.min()) >= 0x01
        assert int(scales.max()) <= 0x7E


def test_blocks_without_a_code_have_scale_one() -> None:
    tiny = torch.tensor([0.0, -0.0, 2.0**-11, -(2.0**-11), 1e-38])
    codes, scales = encode(tiny.unsqueeze(1).repeat(1, 16))
    assert scales.tolist() == [ONE_BYTE] * 5
    assert not bool(codes.any())


def test_normal_scales_win_ties() -> None:
    """2 * 2^-9 * 4 = 2^-6 * 1: a subnormal and a normal scale are both exact."""
    blocks = torch.zeros(2, 16)
    blocks[0, 3], blocks[1, 5] = 2.0**-6, -(2.0**-7)
    codes, scales = encode(blocks)
    assert bool((scales >= 0x08).all())
    assert float(emitted_errors(blocks, codes, scales).sum()) == 0.0


def test_ties_go_to_the_nearest_offset() -> None:
    """A lone value v(b) * 6 is exact at b, at the scale of twice v(b) and others; b is taken."""
    start = torch.arange(0x10, 0x79, dtype=torch.uint8)
    blocks = torch.zeros(len(start), 16)
    blocks[:, 7] = ml_e4m3(start).float() * 6.0
    assert torch.equal(encode(blocks)[1], start)


def test_tiles_and_threads_do_not_change_a_byte() -> None:
    blocks = random_blocks("heavy", 4096, -12.0, 8.0)
    codes, scales = encode(blocks)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        parts = [encode(part) for part in (blocks[:7], blocks[7:1000], blocks[1000:])]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([part[0] for part in parts]), codes)
    assert torch.equal(torch.cat([part[1] for part in parts]), scales)


def scale_value(mantissa: int, offset: int) -> Fraction:
    octave, rest = divmod(mantissa + offset, 8)
    return Fraction(8 + rest) * Fraction(2) ** octave


def squared_error(x: Fraction, scale: Fraction) -> Fraction:
    return min((x - code * scale) ** 2 for code in GRID)


def is_dominated(
    mantissa: int, offset: int, mixture: dict[int, Fraction], low: Fraction, high: Fraction
) -> bool:
    """Whether `offset` loses to some byte of `mixture` for every block with amax in [low, high].

    It does if the mixture's weighted mean error is not greater than its own. Both are sums over
    16 values of piecewise quadratics with equal leading terms, so the difference is piecewise
    linear and largest at a breakpoint. The first value is the amax, the others are at most it.
    """
    scale = scale_value(mantissa, offset)
    others = {scale_value(mantissa, o): share for o, share in mixture.items()}
    assert sum(mixture.values()) == 1
    breaks = {(a + b) / 2 * s for s in (scale, *others) for a, b in itertools.pairwise(GRID)}
    points = [Fraction(0), high, *(x for x in breaks if x < high)]

    def difference(x: Fraction) -> Fraction:
        mean = sum((share * squared_error(x, s) for s, share in others.items()), Fraction(0))
        return mean - squared_error(x, scale)

    of_amax = max(difference(x) for x in (low, *(p for p in points if p >= low)))
    return of_amax + 15 * max(difference(x) for x in points) <= 0


@pytest.mark.parametrize("mantissa", range(8))
def test_bytes_below_the_window_are_never_needed(mantissa: int) -> None:
    """A certificate in exact rationals: b0 - 4 and below lose to a mixture of higher bytes.

    Normal scales repeat every octave, so eight mantissas stand for all. An offset that loses to
    one outside the window loses to what that one loses to.
    """
    below = Fraction(1, 4) if mantissa == 0 else Fraction(1, 2)
    first, last = (
        6 * (scale_value(mantissa, 0) - below),
        6 * (scale_value(mantissa, 0) + Fraction(1, 2)),
    )
    pieces = [first + (last - first) * i / 8 for i in range(9)]
    for offset in range(-4, -24, -1):
        mixtures = [
            {offset + 8: Fraction(1)},
            *(
                {offset + 8: Fraction(k, 10), o: 1 - Fraction(k, 10)}
                for k in (6, 7, 8)
                for o in (-2, -1, 0, 1)
            ),
            {4: Fraction(12, 20), -3: Fraction(5, 20), 0: Fraction(3, 20)},
        ]
        mixtures = [m for m in mixtures if all(o > offset for o in m)]
        for low, high in itertools.pairwise(pieces):
            assert any(is_dominated(mantissa, offset, m, low, high) for m in mixtures), offset


def test_the_certificate_does_not_hold_inside_the_window() -> None:
    one, half = Fraction(6) * 8, Fraction(1, 2)
    mixtures = [
        {a: half, b: half} for a, b in itertools.combinations(WINDOW, 2) if -1 not in (a, b)
    ]
    assert not any(is_dominated(0, -1, m, one, one + Fraction(1, 8)) for m in mixtures)
