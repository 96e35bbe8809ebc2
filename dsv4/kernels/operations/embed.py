"""Tokens to the residual streams of the first layer: `streams[t, i] = table[token[t]]` for all i.

A token outside the table, such as that of a row whose logits were not finite, gives
infinity, which a norm makes NaN: what follows it stays invalid. The result is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsv4.formats.config import ModelConfig
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, kernel

IMPLEMENTATION = "dsv4.kernels.sm90.sampling.embed:Embed"


def embed(vocab: int, hidden: int, copies: int, pdl: bool = True) -> Kernel:
    """Arguments: token int32 `[T]`; table bfloat16 `[V, D]`; streams bfloat16 `[T, copies, D]`."""
    return kernel(
        "embed",
        IMPLEMENTATION,
        {"vocab": vocab, "hidden": hidden, "copies": copies, "pdl": pdl},
        (
            Argument("token", torch.int32, ("rows",), align=4),
            Argument("table", torch.bfloat16, (vocab, hidden)),
            Argument("streams", torch.bfloat16, ("rows", copies, hidden), "out"),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The model's table, for each number of rows."""
    for count in rows:
        yield case(config.vocab_size, config.hidden_size, config.hc_mult, model, count)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Tokens outside a small table beside its first and last ones."""
    yield case(1000, config.hidden_size, config.hc_mult, model, 8, outside=True)


def case(
    vocab: int, hidden: int, copies: int, model: str, rows: int, outside: bool = False
) -> Case:
    """`rows` random tokens. outside: some of them are none of the table's."""

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        table = torch.randn(vocab, hidden, generator=rng, device=device, dtype=torch.bfloat16)
        token = torch.randint(0, vocab, (rows,), generator=rng, device=device, dtype=torch.int32)
        if outside:
            token[:5] = torch.tensor([-1, vocab, 0, vocab - 1, -(2**31)], device=device)
        streams = torch.empty(rows, copies, hidden, dtype=torch.bfloat16, device=device)
        return {"token": token, "table": table, "streams": streams}

    def expect(buffers: Buffers) -> dict[str, Expected]:
        token = buffers["token"].to(torch.int64)
        rows = buffers["table"][token.clamp(0, vocab - 1)]
        rows[(token < 0) | (token >= vocab)] = torch.inf
        return {"streams": Expected(rows[:, None].repeat(1, copies, 1))}

    touched = rows * hidden * 2 * (1 + copies)
    launch = Launch(embed(vocab, hidden, copies))
    name = "outside" if outside else "table"
    return Case("embed", name, model, rows, (launch,), touched, make, expect)
