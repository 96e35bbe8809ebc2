"""A token of each row of logits, and the counters of the next step, on the device.

Reference: `dsv4.kernels.reference.sampling`, which decides with integers only; the kernel gives the
same token to the last bit, so that a tolerance has no place. All parameters are read from device
memory, a row's own: a captured graph serves any mixture of requests.

A row whose logits hold NaN or infinity, or are all -infinity, gives -1, which is no token: it is
not to be looked up. Values are the host's to refuse: temperature finite and not negative, 0 for
greedy; top_p above 0; top_k 0 for all; ids from `allowed` on are never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.reference.sampling import Parameters, sample

IMPLEMENTATION = "dsv4.kernels.ops.sampling.kernel:Sample"
TUNING: dict[str, int | bool] = {"ctas": 16, "warps": 16, "pdl": True}

Fill = Callable[[torch.Generator, int, int], Buffers]


def sampling(vocab: int, tuning: Mapping[str, int | bool] | None = None) -> Kernel:
    """Arguments: logits float32 `[T, V]`; temperature, top_p float32 `[T]`; top_k, allowed int32
    `[T]`; seed int64 `[T]`; counter int64 `[T]` and position int32 `[T]`, which the kernel
    increments; token int32 `[T]`. A draw is number `counter` of its seed.
    """
    rows = ("rows",)
    return kernel(
        "sampling",
        IMPLEMENTATION,
        {"vocab": vocab, **TUNING, **(tuning or {})},
        (
            Argument("logits", torch.float32, ("rows", vocab)),
            Argument("temperature", torch.float32, rows, align=4),
            Argument("top_p", torch.float32, rows, align=4),
            Argument("top_k", torch.int32, rows, align=4),
            Argument("allowed", torch.int32, rows, align=4),
            Argument("seed", torch.int64, rows, align=8),
            Argument("counter", torch.int64, rows, "inout", align=8),
            Argument("position", torch.int32, rows, "inout", align=4),
            Argument("token", torch.int32, rows, "out", align=4),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The model's vocabulary: greedy, all tokens, and top-p."""
    for shape, fill in {"greedy": greedy, "all": plain, "top-p 0.95": nucleus}.items():
        for count in rows:
            yield case(config.vocab_size, shape, model, count, fill)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ties, rows that are refused, extreme parameters."""
    for shape, fill in UNUSUAL.items():
        yield case(config.vocab_size, shape, model, 8, fill)


def case(
    vocab: int,
    shape: str,
    model: str,
    rows: int,
    fill: Fill,
    tuning: Mapping[str, int | bool] | None = None,
) -> Case:
    """Rows that `fill` makes from a generator, their number, and the size of the vocabulary."""

    def make(rng: torch.Generator) -> Buffers:
        buffers = parameters(rng, rows, vocab) | fill(rng, rows, vocab)
        return buffers | {"token": torch.empty(rows, dtype=torch.int32, device=rng.device)}

    def expect(buffers: Buffers) -> dict[str, Expected]:
        drawn = sample(buffers["logits"], Parameters(*(buffers[n] for n in Parameters._fields)))
        return {
            "token": Expected(drawn.to(torch.int32)),
            "counter": Expected(buffers["counter"] + 1),
            "position": Expected(buffers["position"] + 1),
        }

    launch = Launch(sampling(vocab, tuning))
    return Case("sampling", shape, model, rows, (launch,), rows * vocab * 4, make, expect)


def parameters(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Temperature 1 and nothing else; seeds and counters of all sizes."""
    device = rng.device

    def some(high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, high, (rows,), generator=rng, device=device, dtype=dtype)

    return {
        "temperature": torch.ones(rows, device=device),
        "top_p": torch.ones(rows, device=device),
        "top_k": torch.zeros(rows, dtype=torch.int32, device=device),
        "allowed": torch.full((rows,), vocab, dtype=torch.int32, device=device),
        "seed": some(2**63 - 1, torch.int64),
        "counter": some(2**40, torch.int64),
        "position": some(2**20, torch.int32),
    }


def some_logits(rng: torch.Generator, rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    """About as uneven as a model's: of 129,280 tokens the likeliest has a few hundredths."""
    return spread * torch.randn(rows, vocab, generator=rng, device=rng.device)


def plain(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """All tokens may be drawn."""
    return {"logits": some_logits(rng, rows, vocab)}


def greedy(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Temperature 0."""
    temperature = torch.zeros(rows, device=rng.device)
    return {"logits": some_logits(rng, rows, vocab), "temperature": temperature}


def nucleus(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """top_p 0.95."""
    return plain(rng, rows, vocab) | {"top_p": torch.full((rows,), 0.95, device=rng.device)}


def mixed(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Every row with other parameters, down to those that leave one token."""
    device = rng.device
    turn = torch.arange(rows, device=device) % 8
    some = torch.tensor
    return {
        "logits": some_logits(rng, rows, vocab),
        "temperature": some([1.0, 0.6, 2.5, 1e-3, 1.0, 1.4e-45, 3e38, 0.7], device=device)[turn],
        "top_p": some([0.3, 1e-6, 0.999, 0.9, 1.0, 0.5, 0.4, 0.8], device=device)[turn],
        "top_k": some([0, 0, 40, 0, 1, 3, 50000, 2**31 - 1], device=device)[turn].int(),
        "allowed": some([vocab, vocab // 2, vocab - 1, 5, vocab, 1, 2**31 - 1, 77], device=device)[
            turn
        ].int(),
    }


def ties(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Few different logits, -0 among them, or all equal; the parameters of `mixed`."""
    filled = mixed(rng, rows, vocab)
    logits = (filled["logits"] / 3).round()
    logits[1::4] = -7.25
    logits[2::4] = torch.where(logits[2::4] > 0, 0.0, -0.0)
    allowed = torch.full((rows,), vocab, dtype=torch.int32, device=rng.device)
    return filled | {"logits": logits, "allowed": allowed}


def greedy_ties(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """The same, greedy: the lowest id of the largest."""
    return ties(rng, rows, vocab) | {"temperature": torch.zeros(rows, device=rng.device)}


def masked(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Most logits -infinity; of some rows one is left, or tokens that have no weight."""
    filled = mixed(rng, rows, vocab)
    logits: Tensor = filled["logits"]
    logits[torch.rand(logits.shape, generator=rng, device=rng.device) < 0.999] = -math.inf
    logits[:, 3] = torch.where(torch.arange(rows, device=rng.device) % 2 == 0, 1e30, 0.5)
    logits[3::4, 4:] = -math.inf
    return filled | {"logits": logits}


def refused(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Rows with NaN of either sign, with infinity, or only -infinity, beside sound ones."""
    filled = mixed(rng, rows, vocab)
    logits: Tensor = filled["logits"]
    negative_nan = torch.tensor(-(2**22), dtype=torch.int32).view(torch.float32).item()
    logits[0, vocab - 1] = math.nan
    logits[2::8, 2], logits[4::8, vocab // 2] = negative_nan, math.inf
    logits[5::8] = -math.inf
    logits[3::8, 5:] = math.nan  # beyond what is allowed there
    filled["temperature"][4::8] = 0.0
    return filled


def wide(rng: torch.Generator, rows: int, vocab: int) -> Buffers:
    """Logits of every magnitude there is, subnormal ones included."""
    filled = mixed(rng, rows, vocab)
    powers = torch.randint(-149, 127, (rows, vocab), generator=rng, device=rng.device)
    return filled | {"logits": torch.ldexp(filled["logits"] / 16, powers)}


UNUSUAL: dict[str, Fill] = {
    "mixed parameters": mixed,
    "ties": ties,
    "greedy ties": greedy_ties,
    "masked": masked,
    "refused": refused,
    "wide": wide,
}
