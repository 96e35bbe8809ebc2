"""One token id from one row of logits: greedy, or by temperature, top-k, top-p and min-p.

The draw itself is `dsv4.kernels.reference.sampling`; the GPU's kernel draws the same tokens. What
that kernel does not know (biases, penalties, min-p, top-p of what top-k leaves) is done to logits
beforehand, by `dsv4.runtime.text.warping`; on a GPU such tokens are drawn on the host. No
generator has a state: a draw is a function of logits, parameters, seed and a counter of draws. The
global random state is neither read nor written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.settings import GenerationSettings
from dsv4.kernels.reference.sampling import INVALID_TOKEN, MAX_VOCAB, Parameters, sample
from dsv4.runtime.text.warping import Context, Penalties, biased, keep

__all__ = ["INVALID_TOKEN", "Sampler"]

_SEED_LIMIT = 1 << 63


class Sampler:
    """Draws token ids from logits. Equal seeds give equal draws, on any device.

    `temperature` 0 is greedy: the largest logit, the lowest id among equals. `top_p` keeps the
    smallest set of most likely ids whose probabilities reach `top_p` (Holtzman et al. 2020),
    equal logits in id order, of what `top_k` leaves: that many at most, None all. `min_p` keeps
    ids at least so many times as likely as the likeliest. Penalties: `runtime.warping`; they look
    at what `begin` and `took` were told. `bias` is added to the logits of its ids before all else
    (OpenAI's `logit_bias`). `allowed` restricts the draw to ids below it: rows of the
    head beyond the tokenizer's range are padding. `seed` None takes one from the system. `drawn`
    counts the tokens drawn so far. Temperature and `top_p` are used as float32.

    Raises RuntimeRefusal for a temperature that is negative or not finite, a `top_p` outside
    (0, 1], a `min_p` outside [0, 1], a seed outside [0, 2^63), a `top_k` or an `allowed` below 1,
    a repetition penalty that is not above 0, and penalties or a bias that are not finite.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        bias: Mapping[int, float] | None = None,
        allowed: int | None = None,
    ) -> None:
        if not (0 <= temperature <= torch.finfo(torch.float32).max):
            raise RuntimeRefusal(
                f"temperature is {temperature}, expected a finite number from 0 (greedy) up"
            )
        if not 0 < top_p <= 1:
            raise RuntimeRefusal(f"top_p is {top_p}, expected more than 0 and at most 1")
        if seed is not None and not 0 <= seed < _SEED_LIMIT:
            raise RuntimeRefusal(f"seed is {seed}, expected an integer in [0, 2^63)")
        if top_k is not None and top_k < 1:
            raise RuntimeRefusal(f"top_k is {top_k}, expected at least one token")
        if not 0 <= min_p <= 1:
            raise RuntimeRefusal(f"min_p is {min_p}, expected a number from 0 (all tokens) to 1")
        if not 0 < repetition_penalty < math.inf:
            raise RuntimeRefusal(
                f"repetition_penalty is {repetition_penalty}, expected a finite number above 0"
            )
        for name, value in (("presence", presence_penalty), ("frequency", frequency_penalty)):
            if not math.isfinite(value):
                raise RuntimeRefusal(f"{name}_penalty is {value}, expected a finite number")
        for token, value in (bias or {}).items():
            if token < 0 or not math.isfinite(value):
                raise RuntimeRefusal(f"the bias of token {token} is {value}, expected a number")
        if allowed is not None and allowed < 1:
            raise RuntimeRefusal(f"allowed is {allowed}, expected at least one token id")
        self.temperature = temperature
        self.top_p = top_p
        self.seed = torch.Generator().seed() % _SEED_LIMIT if seed is None else seed
        self.top_k = top_k
        self.min_p = min_p
        self.penalties = Penalties(repetition_penalty, presence_penalty, frequency_penalty)
        self.bias = dict(bias or {})
        self.allowed = allowed
        self.drawn = 0
        self._context = Context()

    @classmethod
    def from_settings(
        cls,
        settings: GenerationSettings,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        bias: Mapping[int, float] | None = None,
        allowed: int | None = None,
    ) -> Sampler:
        """Draws as the checkpoint asks, but for what is given here; `top_k` 0 is all tokens.

        Raises RuntimeRefusal as the class does.
        """

        def chosen(given: float | None, own: float) -> float:
            return own if given is None else given

        most = settings.top_k if top_k is None else top_k
        nucleus = chosen(top_p, settings.top_p)
        if top_p is None and settings.top_p == 0:  # the likeliest alone, as in transformers
            most, nucleus = 1, 1.0
        return cls(
            chosen(temperature, settings.own_temperature),
            nucleus,
            seed,
            top_k=most or None,
            min_p=chosen(min_p, settings.min_p),
            repetition_penalty=chosen(repetition_penalty, settings.repetition_penalty),
            presence_penalty=chosen(presence_penalty, settings.presence_penalty),
            frequency_penalty=chosen(frequency_penalty, settings.frequency_penalty),
            bias=bias,
            allowed=allowed,
        )

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken, after penalties."""
        return self.temperature == 0

    def host_reason(self) -> str | None:
        """What the GPU's kernel cannot draw, as a sentence; None when it can."""
        found = []
        if self._warps and self.min_p:
            found.append("min-p")
        elif self._warps:
            found.append("top-k together with top-p")
        if not self.penalties.neutral:
            found.append("a penalty on tokens that were there before")
        if self.bias:
            found.append("a bias of tokens")
        if not found:
            return None
        return f"{' and '.join(found)}: each token is drawn on the host, which takes longer"

    def begin(self, prompt: Iterable[int]) -> None:
        """An answer begins; prompt: all ids before it, which penalties look at."""
        if not self.penalties.neutral:
            self._context = Context(prompt)

    def took(self, token: int) -> None:
        """The answer goes on with `token`."""
        if not self.penalties.neutral:
            self._context.add(token)

    @property
    def _warps(self) -> bool:
        """Whether tokens have to be left out before the draw."""
        both = self.top_k is not None and self.top_p < 1
        return not self.greedy and (both or self.min_p > 0)

    def __call__(self, logits: Tensor) -> Tensor:
        """float [..., vocab] -> int64 [...] on the same device, INVALID_TOKEN for a bad row.

        Raises RuntimeRefusal for more than 2^17 ids.
        """
        if logits.shape[-1] > MAX_VOCAB:
            raise RuntimeRefusal(f"{logits.shape[-1]} logits a row, expected at most {MAX_VOCAB}")
        rows = logits.reshape(-1, logits.shape[-1])
        parameters = self.parameters(len(rows), logits.device)
        self.drawn += len(rows)
        if self.bias:
            rows = biased(rows, self.bias)
        if not self.penalties.neutral:
            rows = self._context.penalised(rows, self.penalties)
        if self._warps:
            rows = keep(rows, parameters, self.min_p)
            parameters = parameters._replace(
                top_p=torch.ones_like(parameters.top_p), top_k=torch.zeros_like(parameters.top_k)
            )
        return sample(rows, parameters).view(logits.shape[:-1])

    def parameters(self, rows: int, device: torch.device) -> Parameters:
        """Those of the next `rows` draws."""

        def fill(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        most = min(self.top_k or 0, MAX_VOCAB)
        allowed = MAX_VOCAB if self.allowed is None else min(self.allowed, MAX_VOCAB)
        return Parameters(
            fill(self.temperature, torch.float32),
            fill(self.top_p, torch.float32),
            fill(most, torch.int32),
            fill(allowed, torch.int32),
            fill(self.seed, torch.int64),
            self.drawn + torch.arange(rows, device=device),
        )
