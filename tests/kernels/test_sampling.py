"""Drawing tokens: exact numbers, the right distribution, and kernels that draw the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.sampling import contract as sampling
from dsv4.kernels.ops.sampling.contract import UNUSUAL, case, cases, checks, mixed, nucleus, plain
from dsv4.kernels.reference.sampling import (
    INVALID_TOKEN,
    POLYNOMIAL,
    Parameters,
    mass_limit,
    philox,
    random_bits,
    sample,
    scale,
    weights,
)
from tests.support.interpreter.alterations import WAIT, instead, without
from tests.support.interpreter.run import faults
from tests.support.machine_code import machine_code

VOCAB = 520  # two vectors of a lane
SMALL = {"ctas": 2, "warps": 2}


def _rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def _pair(first: int, second: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([first]), torch.tensor([second])


def _parameters(rows: int, **values: float) -> Parameters:
    filled = sampling.parameters(_rng(), rows, 1 << 17)
    filled["seed"], filled["counter"] = torch.full((rows,), 7), torch.arange(rows)
    for name, value in values.items():
        filled[name] = torch.full_like(filled[name], value)
    return Parameters(*(filled[name] for name in Parameters._fields))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # kat_vectors of Random123
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_is_philox(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in philox(_words(*counter), _words(*key))) == expected


def test_random_numbers_are_scaled_exactly() -> None:
    draw = random.Random(1)
    for _ in range(300):
        number, total = draw.getrandbits(64), draw.getrandbits(draw.choice((1, 31, 47, 63)))
        words = _pair(number & 0xFFFFFFFF, number >> 32)
        assert int(scale(words, torch.tensor([total]))) == number * total >> 64


def test_the_polynomial_is_a_power_of_two() -> None:
    """In integers, against long double: relative error below 2^-31, no overflow of a word."""
    draw = random.Random(2)
    for x in [0, 1, 2**32 - 1, *(draw.getrandbits(32) for _ in range(20_000))]:
        result = POLYNOMIAL[-1]
        for coefficient in reversed(POLYNOMIAL[:-1]):
            result = coefficient + (result * x >> 32)
            assert result < 2**32
        value, true = 1 + (result * x >> 32) / 2**32, 2.0 ** (x / 2**32)
        assert abs(value / true - 1) < 2.0**-31, x


@pytest.mark.parametrize("temperature", [0.3, 1.0, 50.0])
def test_weights_are_exponentials(temperature: float) -> None:
    """Relative error 2^-30, and one unit for rounding down."""
    logits = 8 * torch.randn(4, 20_000, generator=_rng())
    peak = logits.max(-1).values
    found = weights(logits, peak, torch.full((4,), temperature))
    divisor = torch.full((4, 1), temperature).double()
    true = ((logits.double() - peak.double()[:, None]) / divisor).exp() * 2.0**46
    assert bool(((found.double() - true).abs() <= true * 2.0**-30 + 1).all())
    assert int(found.max()) < 2**46


def _kept(logits: Tensor, top_p: float) -> Tensor:
    """By sorting, from the reference's weights and limit."""
    weight = weights(logits[None], logits.max()[None], torch.ones(1))
    limit = mass_limit(weight.sum(-1), torch.tensor([top_p]))
    order = torch.sort(logits, descending=True, stable=True).indices
    before = weight[0, order].cumsum(0) - weight[0, order]
    return torch.zeros(len(logits), dtype=torch.bool).scatter(0, order, before < limit)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_top_p_keeps_what_transformers_keeps(top_p: float, seed: int) -> None:
    logits = 2 * torch.randn(1000, generator=_rng(seed))
    warped = TopPLogitsWarper(top_p)(torch.empty(1, 0), logits.double()[None])[0]
    assert torch.equal(_kept(logits, top_p), warped.isfinite())


def test_equal_logits_are_kept_in_id_order() -> None:
    assert _kept(torch.full((10_000,), -3.0), 0.29995).nonzero()[:, 0].tolist() == [*range(3000)]
    draws = sample(torch.full((4000, 20), 1.5), _parameters(4000, top_p=0.34))
    assert sorted(set(draws.tolist())) == [*range(7)]


def _improbable(counts: Tensor, expected: Tensor) -> bool:
    """Pearson's chi-square beyond what has probability 1e-9 (Wilson and Hilferty)."""
    rare = expected < 5  # taken together, where that is enough to count
    pooled = rare & bool(expected[rare].sum() >= 5)
    if bool((counts[rare & ~pooled] > 0).sum() > 5) or bool(counts[expected == 0].any()):
        return True
    counts = torch.cat((counts[~rare], counts[pooled].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[pooled].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return bool((statistic / freedom) ** (1 / 3) > 1 - spread + 6.0 * math.sqrt(spread))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 1.0, 6), (1.0, 0.5, 0)]
)
def test_draws_are_distributed_as_the_kept_weights(
    temperature: float, top_p: float, top_k: int
) -> None:
    logits, draws = 1.5 * torch.randn(60, generator=_rng()), 40_000
    p = _parameters(draws, temperature=temperature, top_p=top_p, top_k=top_k)
    found = torch.bincount(sample(logits.expand(draws, -1), p), minlength=60)
    scaled = logits.double() / torch.tensor(temperature).double()
    ordered, order = scaled.softmax(-1).sort(descending=True)
    kept = (ordered.cumsum(0) - ordered < top_p) & (torch.arange(60) < (top_k or 60))
    chances = torch.zeros(60, dtype=torch.float64).scatter(0, order, ordered * kept)
    chances /= chances.sum()
    assert not _improbable(found, chances * draws)
    assert _improbable(found, (chances + 0.2 / 60) / 1.2 * draws)


def test_draws_of_a_whole_vocabulary_follow_the_softmax() -> None:
    logits, draws = 3 * torch.randn(FLASH.vocab_size, generator=_rng()), 256
    chances = logits.double().softmax(-1)
    bins = (chances.cumsum(0) * 16).long().clamp(max=15)
    found = torch.zeros(16, dtype=torch.int64)
    for first in range(0, draws, 32):
        p = _parameters(32)._replace(counter=torch.arange(first, first + 32))
        found += torch.bincount(bins[sample(logits.expand(32, -1), p)], minlength=16)
    expected = torch.zeros(16, dtype=torch.float64).index_add(0, bins, chances)
    assert not _improbable(found, expected * draws)


def test_seeds_counters_and_attempts_give_different_bits() -> None:
    found = {
        tuple(int(word) for word in random_bits(*_pair(seed, counter), attempt))
        for seed in (0, 1, 1 << 40)
        for counter in (0, 1, 1 << 40)
        for attempt in (0, 1)
    }
    assert len(found) == 18


def _drawn(fill: sampling.Fill, rows: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    buffers = case(VOCAB, "some", "none", rows, fill).make(_rng())
    p = Parameters(*(buffers[name] for name in Parameters._fields))
    together = sample(buffers["logits"], p)
    for row in range(rows):
        one = Parameters(*(value[row : row + 1] for value in p))
        assert sample(buffers["logits"][row : row + 1], one)[0] == together[row], "alone"
    return buffers, together


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_rows(name: str) -> None:
    buffers, token = _drawn(UNUSUAL[name])
    allowed = buffers["allowed"].clamp(max=VOCAB).tolist()
    for row, (logits, end) in enumerate(zip(buffers["logits"], allowed, strict=True)):
        peak = logits[:end].max()
        if not peak.isfinite():
            assert token[row] == INVALID_TOKEN
            continue
        assert 0 <= token[row] < end and logits[token[row]] > -math.inf
        if buffers["top_k"][row] == 1 or buffers["top_p"][row] < 1e-5:
            assert token[row] == logits[:end].argmax()
        if buffers["temperature"][row] < 1e-30:
            assert logits[token[row]] == peak
    refused = (token == INVALID_TOKEN).nonzero()[:, 0].tolist()
    assert refused == {"refused": [0, 2, 4, 5], "masked": [5]}.get(name, [])


def test_a_wrong_token_is_caught() -> None:
    one = case(VOCAB, "some", "none", 8, mixed)
    want = one.expect(one.make(_rng()))["token"]
    assert fault("token", want.value, want) is None
    altered = want.value.clone()
    altered[3] += 1
    assert "1 of 8" in str(fault("token", altered, want))


def test_cases_and_checks_are_consistent() -> None:
    for one in (*cases(FLASH, "flash", (1, 8)), *checks(FLASH, "flash")):
        assert one.nbytes > 0 and one.rows in (1, 8)
    assert len({str(one) for one in (*cases(FLASH, "f", (1,)), *checks(FLASH, "f"))}) == 9


@pytest.mark.parametrize("name", [*UNUSUAL, "nucleus", "plain"])
def test_the_kernel_draws_the_same_tokens(name: str) -> None:
    fill = {**UNUSUAL, "nucleus": nucleus, "plain": plain}[name]
    arch = "sm_100a" if name in ("ties", "plain") else "sm_90a"
    rows = 8 if name in ("mixed parameters", "refused") else 4
    assert faults(case(VOCAB, name, "none", rows, fill, SMALL), arch, seed=3) == []


ALTERATIONS: dict[str, Callable[[str], str]] = {
    "the largest logit is not waited for": without(WAIT, 0),
    "sums are not waited for": without(WAIT, 1),
    "the token is not waited for": without(WAIT, 2),
    "a number is not sent": without(r"st\.async[^;]*;", 1),
    "a coefficient is off": instead(str(POLYNOMIAL[0]), str(POLYNOMIAL[0] - 9999999)),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_kernel_is_caught(name: str) -> None:
    one = case(VOCAB, "altered", "none", 2, nucleus, SMALL)
    for seed in range(8):
        try:
            if faults(one, "sm_90a", seed, ALTERATIONS[name]):
                return
        except (AssertionError, RuntimeError):
            return
    pytest.fail("no order of events shows it")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="1002 logits a row, expected a multiple of 4"):
        machine_code(sampling.sampling(1002), "sm_90a")


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_machine_code(arch: str) -> None:
    code = machine_code(sampling.sampling(FLASH.vocab_size), arch)
    assert code.spilled <= 16, "more than four words"
    assert "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64" in code.ptx
    assert "fma.rn.f64" not in code.ptx, "fused, other than the reference"
    assert code.ptx.index("griddepcontrol.wait") < code.ptx.index("ld.global")
