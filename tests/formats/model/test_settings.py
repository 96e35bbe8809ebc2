"""generation_config.json: what transformers would use, null as absent, every field told."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from transformers import GenerationConfig

from dsv4.formats.errors import ConfigError
from dsv4.formats.model.releases import FLASH
from dsv4.formats.model.settings import _NEUTRAL, _READ, _UNSAID, GenerationSettings

CHOICES: dict[str, list[Any]] = {
    "do_sample": [True, False],
    "temperature": [0.3, 1.0, 1, 2, 0.7],
    "top_p": [0.1, 0.95, 1.0, 1, 0],
    "top_k": [0, 1, 50, 7],
    "min_p": [0.0, 0.05, 1],
    "repetition_penalty": [1.0, 1.2, 0.5, 2],
    "max_new_tokens": [1, 512],
    "max_length": [20, 4096],
    "eos_token_id": [1, [1], [5, 1, 7], 128804],
    "num_beams": [1, 4],
    "typical_p": [1.0, 0.9],
    "no_repeat_ngram_size": [0, 3],
    "min_new_tokens": [5],
    "suppress_tokens": [[3, 4]],
    "pad_token_id": [2],
    "bos_token_id": [0],
    "use_cache": [True],
    "transformers_version": ["4.46.3"],
}


WRONG: tuple[Any, ...] = ("hot", {}, -2)


def read(document: dict[str, Any]) -> GenerationSettings:
    return GenerationSettings.from_json(json.dumps(document).encode(), FLASH)


def as_transformers(document: dict[str, Any]) -> GenerationConfig:
    """What `generate` starts from: the file's values, then transformers' defaults for the rest."""
    config = GenerationConfig(**document)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    return config


def random_document(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(sorted(CHOICES), rng.randrange(len(CHOICES)))
    return {name: rng.choice([*CHOICES[name], None]) for name in names}


def test_values_are_those_that_transformers_uses() -> None:
    rng = random.Random(1)
    for _ in range(500):
        document = random_document(rng)
        # top_k 50 and max_length 20 of transformers are nobody's wish: absent stays absent here.
        given = {name: value for name, value in document.items() if value is not None}
        theirs = as_transformers({"top_k": 0} | given)
        ours = read(document)
        for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty"):
            assert getattr(ours, name) == getattr(theirs, name), (name, document)
        assert ours.min_p == (theirs.min_p or 0.0)
        assert ours.max_new_tokens == theirs.max_new_tokens
        assert ours.max_length == document.get("max_length")
        end = theirs.eos_token_id
        ends = {1} | set([] if end is None else end if isinstance(end, list) else [end])
        assert ours.eos_token_ids == tuple(sorted(ends))


def test_null_is_absent() -> None:
    rng = random.Random(2)
    for _ in range(200):
        document = random_document(rng)
        with_nulls = dict.fromkeys(CHOICES) | document
        assert read(with_nulls) == read({k: v for k, v in document.items() if v is not None})


def test_every_field_that_transformers_knows_is_used_neutral_or_without_effect() -> None:
    known = set(GenerationConfig().to_dict()) | set(vars(GenerationConfig()))
    defaults = GenerationConfig._get_default_generation_params()
    for name in known:
        assert (name in _READ) + (name in _NEUTRAL) + (name in _UNSAID) <= 1, name
    for name, value in defaults.items():
        if name in _NEUTRAL and value is not None:
            assert _NEUTRAL[name] == value, name
        assert read({name: value}).ignored == (), name
    assert read(GenerationConfig().to_dict()).ignored == ()
    # Whatever else is set is named, be it unknown.
    for name in known - set(_READ) - _UNSAID:
        assert read({name: [17]}).ignored == (f"{name} [17]",)
    assert read({"my_own": 3, "num_beams": 4}).ignored == ("my_own 3", "num_beams 4")


def test_each_ignored_field_is_named_once_in_one_sentence() -> None:
    found = read({"do_sample": True, "num_beams": 4, "temperature": 0.5, "a\x1bb": "x"})
    (sentence,) = found.notices()
    assert sentence.count("num_beams 4") == 1 and "temperature" not in sentence
    assert "\x1b" not in sentence
    (sentence,) = read({"temperature": 0.5, "top_k": 50, "min_p": 0.0}).notices()
    assert "temperature 0.5 (the text is drawn greedily)" in sentence
    assert "top_k" not in sentence and "min_p" not in sentence
    assert read({"temperature": 0.5}).notices(greedy=False) == ()
    assert read({}).notices() == ()


def test_without_the_file_the_releases_settings_hold() -> None:
    found = GenerationSettings.from_json(None, FLASH)
    assert found.own_temperature == 1.0 and found.top_p == 1.0
    assert found.eos_token_ids == FLASH.eos_token_ids
    several = dataclasses.replace(FLASH, eos_token_ids=(9, 1))
    assert GenerationSettings.from_json(b'{"eos_token_id": 4}', several).eos_token_ids == (1, 4, 9)


def test_the_bound_on_an_answer() -> None:
    assert read({}).new_tokens(10) is None
    assert read({"max_new_tokens": 7}).new_tokens(10) == 7
    assert read({"max_length": 30}).new_tokens(10) == 20
    assert read({"max_length": 30, "max_new_tokens": 7}).new_tokens(10) == 7, "as transformers"
    assert read({"max_length": 10}).new_tokens(10) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in CHOICES if name in _READ for value in WRONG),
        ("temperature", True),
        ("temperature", [1]),
        ("temperature", 1e39),
        ("top_p", 1.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", False),
        ("presence_penalty", "x"),
        ("top_k", 1.0),
        ("top_k", True),
        ("do_sample", 1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 5.0),
        ("max_length", 0),
        ("eos_token_id", [1, "x"]),
        ("eos_token_id", [[1]]),
        ("eos_token_id", True),
    ],
)
def test_a_wrong_value_is_refused_by_file_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read({field: value})
    message = str(caught.value)
    assert message.startswith(f"generation_config.json: {field} is {json.dumps(value)}, expected ")
    assert message.endswith(" or null")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b"\xff", b'{"top_k": NaN}', b'{"top_k": 1, "top_k": 2}']
)
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^generation_config\.json") as caught:
        GenerationSettings.from_json(raw, FLASH)
    assert "\n" not in str(caught.value)


def test_minus_one_is_all_tokens_as_servers_write_it() -> None:
    assert read({"top_k": -1}).top_k == 0
