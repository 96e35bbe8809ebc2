"""The fields of a request that say how an answer is drawn, each honoured or refused by name.

A neutral value of a field that is not honoured passes: clients send dozens of them. What a field
may be stands in `NUMBERS`; what is known and not honoured in `NEUTRAL`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv4.formats.model.settings import GenerationSettings
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.refusal import invalid, unsupported

MAX_CHOICES = 8
MAX_TOKENS = 393216  # of an answer: the recipe's bound
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 300
BAN = -100  # OpenAI: "values like -100 ... should result in a ban of the relevant token"
SEEDS = 1 << 63

NUMBERS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False),
    "top_p": (0, 1, True),
    "min_p": (0, 1, False),
    "presence_penalty": (-2, 2, False),
    "frequency_penalty": (-2, 2, False),
    "repetition_penalty": (0, 100, True),
}
"""Fields -> least and greatest value, and whether the least itself is refused."""

KNOBS = (*NUMBERS, "top_k", "n", "best_of", "seed", "logit_bias", "ignore_eos", "min_tokens")
"""Fields that `read_knobs` reads."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (0, False),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that are known and not honoured -> the values, besides null, that change nothing."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """How an answer is drawn; None where the request said nothing.

    banned: ids that are never drawn. bias: what is added to the logits of ids. logprobs: how
    many of the likeliest are told, None for none.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    banned: frozenset[int] = frozenset()
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    ignore_eos: bool = False
    min_tokens: int = 0

    def sampler(self, settings: GenerationSettings, allowed: int, index: int) -> Sampler:
        """Of the `index`-th choice; what was not said is the checkpoint's.

        allowed: ids below it are text. Choices of a seed follow one another.
        """
        seed = None if self.seed is None else (self.seed + index) % SEEDS
        return Sampler.from_settings(
            settings,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            bias=self.bias,
            allowed=allowed,
        )


def read_knobs(body: Mapping[str, Any], vocab: int, *, logprobs: int | None = None) -> Knobs:
    """What `body` says. logprobs: as the face reads it, for its spelling differs.

    Raises Refusal 400 with the field's name for a value that cannot be, or is not honoured.
    """
    refuse_unsupported(body)
    values: dict[str, Any] = {name: number(body, name, *NUMBERS[name]) for name in NUMBERS}
    top_k = integer(body, "top_k", -1, vocab)
    biases = _biases(body.get("logit_bias"), vocab)
    n = integer(body, "n", 1, MAX_CHOICES) or 1
    if (best := body.get("best_of")) is not None and best != n:
        raise unsupported("best_of", f"best_of is {best!r}, expected n, which is {n}, or nothing")
    return Knobs(
        **values,
        top_k=None if top_k is None else max(top_k, 0),
        seed=integer(body, "seed", 0, SEEDS - 1),
        n=n,
        logprobs=logprobs,
        banned=frozenset(token for token, value in biases.items() if value == BAN),
        bias={token: value for token, value in biases.items() if value not in (0, BAN)},
        ignore_eos=bool(flag(body, "ignore_eos")),
        min_tokens=integer(body, "min_tokens", 0, 1 << 20) or 0,
    )


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise Refusal 400 for the first field of `NEUTRAL` that would change something."""
    for name in NEUTRAL.keys() & body.keys():
        value = body[name]
        if value is not None and value not in NEUTRAL[name]:
            raise unsupported(name, f"{name} is not supported by this server; leave it out")


def number(
    body: Mapping[str, Any], name: str, low: float, high: float, above: bool
) -> float | None:
    """A finite number of `body`, None where there is none. above: `low` itself is refused."""
    value = body.get(name)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high  # which NaN is not
        or (above and value == low)
    ):
        least = f"above {low:g}" if above else f"from {low:g}"
        raise invalid(name, f"{name} is {_shown(value)}, expected a number {least} to {high:g}")
    return float(value)


def integer(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """An integer of `body`, None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise invalid(name, f"{name} is {_shown(value)}, expected an integer from {low} to {high}")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool | None:
    """A boolean of `body`, None where there is none."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"{name} is {_shown(value)}, expected true or false")
    return value


def read_stops(value: Any, name: str = "stop") -> tuple[str, ...]:
    """Texts that end an answer: one, or a list. Raises Refusal 400."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise invalid(name, f"{name} is {_shown(value)}, expected a text or a list of texts")
    if len(stops) > MAX_STOPS or any(len(one) > MAX_STOP_CHARACTERS for one in stops):
        raise invalid(
            name,
            f"{name} has {len(stops)} texts of up to {max(map(len, stops))} characters, expected "
            f"at most {MAX_STOPS} of at most {MAX_STOP_CHARACTERS}",
        )
    return tuple(stops)


def _biases(value: Any, vocab: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise invalid(
            "logit_bias", f"logit_bias is not an object of at most {MAX_BIASES} token ids"
        )
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (len(key) <= 9 and key.isascii() and key.isdecimal() and int(key) < vocab):
            raise invalid(
                "logit_bias", f"logit_bias has {key[:20]!r}, expected token ids below {vocab}"
            )
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not BAN <= bias <= -BAN:
            raise invalid(
                "logit_bias",
                f"logit_bias of {key} is {_shown(bias)}, expected a number from {BAN}, which bans "
                f"the token, to {-BAN}",
            )
        found[int(key)] = float(bias)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
