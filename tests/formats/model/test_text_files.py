"""The files that travel along: what is used, what is named, and what is refused before it moves."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dsv4.formats.model.text_files import TextFileError, TextFiles, read_text_files, read_tokenizer
from dsv4.synthetic.tiny import TINY
from dsv4.synthetic.tokenizer import BOS, EOS, build_tokenizer, files_of

TOKENIZER = build_tokenizer(TINY.vocab_size)
FILES = {
    name: text.encode() for name, text in files_of(TOKENIZER, TINY.max_position_embeddings).items()
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"b" * 64 + b"\nsize 7\n"


def read(**changed: bytes | None) -> TextFiles:
    """The tiny checkpoint's files, `name_json` replaced or left out."""
    named = {key.removesuffix("_json") + ".json": raw for key, raw in changed.items()}
    files = {name: raw for name, raw in (FILES | named).items() if raw is not None}
    return read_text_files(files, TINY)


def configured(**fields: Any) -> TextFiles:
    config = json.loads(FILES["tokenizer_config.json"]) | fields
    return read(tokenizer_config_json=json.dumps(config).encode())


def test_a_sound_checkpoint_has_nothing_to_say() -> None:
    found = read()
    assert found.notices == () and found.settings.eos_token_ids == (1,)
    assert found.tokenizer is not None
    assert found.tokenizer.to_str() == TOKENIZER.to_str()
    assert read(tokenizer_json=None, tokenizer_config_json=None).tokenizer is None
    assert read_text_files({"LICENSE": b"\xff"}, TINY).notices == ()


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (POINTER, "a Git LFS pointer"),
        (b"<html><body>404</body></html>", "an HTML page"),
        (b"", "empty"),
        (b"\0" * 4096, "zeros"),
        (b"PK\x03\x04" + b"x" * 50, "zip"),
        (b'{"error": "Repository not found"}', "Repository not found"),
        (FILES["tokenizer.json"][:-200], "not"),
        (b"[1, 2]", "not"),
        (b"\xff\xfe\x00{", "not"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config"])
def test_a_file_that_is_none_is_refused_by_name_and_kind(name: str, raw: bytes, what: str) -> None:
    with pytest.raises(TextFileError) as caught:
        if name != "tokenizer" and raw.startswith(b"{") and what == "not":
            raw = FILES["tokenizer_config.json"][:-20]
        read(**{f"{name}_json": raw})
    message = str(caught.value)
    assert caught.value.file == f"{name}.json"
    assert message.startswith(f"{name}.json") and "\n" not in message
    assert what in message or (what == "not" and "expected" in message) or "JSON" in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.file, str(again)) == (caught.value.file, message)


def test_a_tokenizer_is_refused_wherever_it_is_cut() -> None:
    raw = FILES["tokenizer.json"]
    for cut in range(0, len(raw) - 1, len(raw) // 23):
        with pytest.raises(TextFileError, match=r"^tokenizer\.json is "):
            read_tokenizer(raw[:cut])


@pytest.mark.parametrize("spelt", ["<think>", {"__type": "AddedToken", "content": "<think>"}])
def test_the_tokenizers_own_end_is_one_more_end(spelt: Any) -> None:
    found = configured(eos_token=spelt)
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<think>")
    assert found.settings.eos_token_ids == (1, theirs.eos_token_id)
    assert found.notices == ()
    both = json.dumps({"eos_token_id": [1, 7]}).encode()
    assert read(generation_config_json=both).settings.eos_token_ids == (1, 7)
    (sentence,) = configured(eos_token="<|im_end|>").notices
    assert "<|im_end|>" in sentence and "does not end an answer" in sentence


@pytest.mark.parametrize("value", [4, ["x"], {"content": 5}])
def test_an_end_that_is_no_token_is_refused(value: Any) -> None:
    with pytest.raises(TextFileError, match=r"tokenizer_config\.json: eos_token is .*, expected a"):
        configured(eos_token=value)


def test_fields_that_are_not_used_are_named_once() -> None:
    found = configured(
        add_bos_token=True,
        chat_template="{{ messages }}",
        model_max_length=TINY.max_position_embeddings - 1,
        do_lower_case=False,
        add_prefix_space=None,
    )
    (sentence,) = found.notices
    for name in ("add_bos_token", "chat_template", "model_max_length"):
        assert sentence.count(name) == 1
    for name in ("do_lower_case", "add_prefix_space", "messages"):
        assert name not in sentence


def test_an_endless_maximum_is_no_maximum() -> None:
    """transformers writes `int(1e30)` for "none": more digits than 64 bits hold."""
    raw = b'{"model_max_length": 1000000000000000019884624838656, "eos_token": null}'
    assert read(tokenizer_config_json=raw).notices == ()


def test_tokens_beyond_the_vocabulary_are_said() -> None:
    larger = Tokenizer.from_str(TOKENIZER.to_str())
    larger.add_tokens([AddedToken(f"<extra{n}>") for n in range(TINY.vocab_size)])
    (sentence,) = read(tokenizer_json=larger.to_str().encode()).notices
    assert str(larger.get_vocab_size() - 1) in sentence and str(TINY.vocab_size - 1) in sentence


def test_a_tokenizer_without_the_templates_tokens_is_said() -> None:
    document = json.loads(FILES["tokenizer.json"])
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<｜User｜>"]
    sentences = read(tokenizer_json=json.dumps(document).encode()).notices
    assert any("<｜User｜>" in s and "--raw" in s for s in sentences)


def test_tokens_that_only_the_config_adds_are_said() -> None:
    added = {"0": {"content": BOS}, "1": {"content": EOS}, "900": {"content": "<|tool|>"}}
    (sentence,) = configured(added_tokens_decoder=added).notices
    assert '"<|tool|>" as 900' in sentence and BOS not in sentence
