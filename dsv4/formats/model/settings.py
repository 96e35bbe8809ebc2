"""How a checkpoint wants its text drawn: generation_config.json together with config.json.

Read as transformers reads it: null is absent, what is absent is neutral, and text is drawn greedily
unless `do_sample` is true. Three things differ. What is absent stays neutral where transformers'
own default is not (top_k 50, max_length 20). The ids that end an answer are those of both files. A
checkpoint without the file is sampled at temperature 1, as DeepSeek recommends for V4.

A field with a wrong value is refused. One that is not used and could change the text is named.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dsv4.formats.errors import ConfigError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.plain_text import printable
from dsv4.formats.strict_json import DuplicateKeyError, parse_strict

GENERATION_FILE = "generation_config.json"
MAX_SHOWN = 80
MAX_INTEGER = 1 << 31
MAX_NUMBER = 3.4028234663852886e38  # of a float32
SAMPLING_TOP_K = 50  # what transformers takes for "not set" when it does not sample

_NEUTRAL: dict[str, Any] = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "constraints": [],
    "diversity_penalty": 0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "force_words_ids": [],
    "guidance_scale": 1,
    "length_penalty": 1,
    "low_memory": False,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_logits": False,
    "output_scores": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "return_dict_in_generate": False,
    "sequence_bias": {},
    "stop_strings": [],
    "suppress_tokens": [],
    "token_healing": False,
    "typical_p": 1,
    "use_cache": True,
    "use_mtp": False,
}
"""Values that change nothing, of fields that are not used. Null changes nothing either."""

_UNSAID = frozenset(
    {
        # Who wrote the file, and ids that only batches, encoders and prompts without text need.
        "_commit_hash",
        "_from_model_config",
        "bos_token_id",
        "decoder_start_token_id",
        "is_assistant",
        "pad_token_id",
        "transformers_version",
        # How transformers works, not what comes out.
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
        "prefill_chunk_size",
    }
)


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What a checkpoint asks for. The names are those of generation_config.json.

    eos_token_ids: what ends an answer, of both files, ascending. do_sample: False is greedy.
    top_k: 0 is all tokens. presence_penalty, frequency_penalty: of OpenAI's interface; transformers
    has none. max_new_tokens bounds the answer, max_length prompt and answer together; None where
    the checkpoint has no bound. ignored: fields that have a value and are not used, as
    "name value". unsampled: the same for fields that only count when do_sample is true.
    """

    eos_token_ids: tuple[int, ...]
    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    ignored: tuple[str, ...] = ()
    unsampled: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, raw: bytes | None, config: ModelConfig) -> GenerationSettings:
        """Read a generation_config.json; None: there is none.

        Raises ConfigError naming the field, what was found and what was expected.
        """
        if raw is None:
            return cls(tuple(sorted(set(config.eos_token_ids))))
        fields = {key: value for key, value in _object(raw).items() if value is not None}
        values = {name: read(name, fields[name]) for name, read in _READ.items() if name in fields}
        values["eos_token_ids"] = tuple(
            sorted({*config.eos_token_ids, *values.pop("eos_token_id", ())})
        )
        values.setdefault("do_sample", False)
        return cls(**values, ignored=_ignored(fields), unsampled=_unsampled(values))

    @property
    def own_temperature(self) -> float:
        """The temperature that the checkpoint is drawn at: 0, which is greedy, without sampling."""
        return self.temperature if self.do_sample else 0.0

    def new_tokens(self, prompt_tokens: int) -> int | None:
        """The checkpoint's bound on the answer to a prompt of so many tokens; None without one.

        As in transformers, max_new_tokens counts where both are there. Below 1 when the prompt
        alone reaches max_length.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        return self.max_length - prompt_tokens

    def notices(self, *, greedy: bool | None = None) -> tuple[str, ...]:
        """At most one sentence: the fields that are not used.

        greedy: whether the text is drawn greedily; None: as the checkpoint asks.
        """
        greedy = self.own_temperature == 0 if greedy is None else greedy
        named = list(self.ignored)
        if greedy and self.unsampled:
            named += [f"{field} (the text is drawn greedily)" for field in self.unsampled]
        if not named:
            return ()
        return (f"{GENERATION_FILE} has settings that are not used: {', '.join(named)}",)


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        document = parse_strict(raw)
    except DuplicateKeyError as error:
        raise ConfigError(f"{GENERATION_FILE}: the key {error} stands twice") from None
    except ValueError as error:
        raise ConfigError(f"{GENERATION_FILE} cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{GENERATION_FILE} is {_shown(document)}, expected a JSON object")
    return document


def _shown(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), MAX_SHOWN)


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    raise ConfigError(f"{GENERATION_FILE}: {name} is {_shown(value)}, expected {expected} or null")


def _number(
    expected: str, low: float, high: float = MAX_NUMBER, *, above: bool = False
) -> Callable[[str, Any], float]:
    """Reads a number from `low` (or above it) up to `high`."""

    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(name, value, expected)
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            _refuse(name, value, expected)
        return float(value)

    return read


def _integer(expected: str, low: int) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= MAX_INTEGER:
            _refuse(name, value, expected)
        return value

    return read


def _top_k(name: str, value: Any) -> int:
    # -1 is how vLLM and SGLang spell "all".
    return max(_integer("an integer from 0 (all tokens) up", -1)(name, value), 0)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, "true, false")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token <= MAX_INTEGER for token in ids):
        _refuse(name, value, "a token id, a list of token ids")
    return tuple(ids)


_PENALTY = _number("a finite number", -MAX_NUMBER)
_COUNT = _integer("an integer from 1 up", 1)

_READ: dict[str, Callable[[str, Any], Any]] = {
    "eos_token_id": _token_ids,
    "do_sample": _boolean,
    "temperature": _number("a number from 0 up", 0),
    "top_p": _number("a number from 0 to 1", 0, 1),
    "top_k": _top_k,
    "min_p": _number("a number from 0 to 1", 0, 1),
    "repetition_penalty": _number("a number above 0", 0, above=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "max_new_tokens": _COUNT,
    "max_length": _COUNT,
}


def _ignored(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that nothing here reads and whose value is not the neutral one, sorted."""
    return tuple(
        f"{printable(name, MAX_SHOWN)} {_shown(value)}"
        for name, value in sorted(fields.items())
        if name not in _READ
        and name not in _UNSAID
        and not (name in _NEUTRAL and value == _NEUTRAL[name])
    )


def _unsampled(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that count in sampling alone and are not neutral, in the order of the class."""
    neutral = {"temperature": (1.0, 0.0), "top_p": (1.0,), "min_p": (0.0,)}
    neutral["top_k"] = (0, SAMPLING_TOP_K)
    return tuple(
        f"{name} {values[name]:g}"
        for name in ("temperature", "top_p", "top_k", "min_p")
        if name in values and values[name] not in neutral[name]
    )
