"""The tiny tokenizer: DeepSeek's markers and splits, and any text round-trips."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepseek_recipe import SpecialToken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dsv4.synthetic.tiny import HF_TINY, ODD, TINY, TINY_DSPARK, write_tiny
from dsv4.synthetic.tokenizer import (
    BOS,
    CORPUS,
    EOS,
    MARKERS,
    MIN_VOCABULARY,
    NOISE,
    PAD,
    build_tokenizer,
    tokenizer_files,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tiny"
    write_tiny(out, TINY)
    return out


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


SHARED_KINDS = (
    "Bos",
    "Eos",
    "ThinkingStart",
    "ThinkingEnd",
    "User",
    "Assistant",
    "LatestReminder",
    "Dsml",
    "Image",
)

TEXTS = [
    "",
    " ",
    "\n\n",
    "Hello, world!",
    "The capital of France is Paris.",
    "1234567890 and 3.14159",
    "你好，世界。これは短い物語です。",
    "   leading, trailing   \t\r\n",
    "é e\u0301 \u200b \U0001f600\U0001f468\u200d\U0001f469",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n",
    "\0\x01\x7f\ufeff\uffff",
    f"{BOS}system<｜User｜>你好<｜Assistant｜><think>推理</think>答案{EOS}",
    "< think > <｜User| > |DSML|",
    CORPUS,
]


@pytest.mark.parametrize("text", TEXTS)
def test_known_texts_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokenizer = _shared()
    ids = encode(tokenizer, text)
    assert all(0 <= i < TINY.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


_cache: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _cache:
        _cache.append(build_tokenizer(TINY.vocab_size))
    return _cache[0]


def test_special_tokens_have_the_real_ids_and_strings(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, BOS) == [0]
    assert encode(tokenizer, EOS) == [1]
    assert encode(tokenizer, PAD) == [2]
    for marker in MARKERS:
        assert len(encode(tokenizer, marker)) == 1, marker
    # Another implementation's spelling of the same markers.
    ours = {BOS, EOS, *MARKERS}
    for name in SHARED_KINDS:
        assert getattr(SpecialToken, name).default_str() in ours, name


def test_only_the_three_are_special_so_chat_markers_survive_decoding(tokenizer: Tokenizer) -> None:
    ids = encode(tokenizer, f"{BOS}<｜User｜>hi<think></think>{EOS}{PAD}")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<｜User｜>hi<think></think>"


def test_text_splits_as_the_real_tokenizer_splits(tokenizer: Tokenizer) -> None:
    """Digits in threes from the left, Chinese apart from letters, a space goes to its word."""
    split = tokenizer.pre_tokenizer.pre_tokenize_str("1234567890")
    assert [span for _, span in split] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    split = tokenizer.pre_tokenizer.pre_tokenize_str("a你好 b")
    assert [span for _, span in split] == [(0, 1), (1, 3), (3, 5)]
    split = tokenizer.pre_tokenizer.pre_tokenize_str("Hello, world!")
    assert [span for _, span in split] == [(0, 5), (5, 6), (6, 12), (12, 13)]


def test_frequent_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    for word in (" the", " river", " and"):
        assert len(encode(tokenizer, word)) == 1, word
    assert len(encode(tokenizer, CORPUS)) < len(CORPUS.encode()) / 2


@pytest.mark.parametrize("vocab_size", [MIN_VOCABULARY, MIN_VOCABULARY + 8, 1024, 1111, 129280])
def test_ids_stay_below_the_vocabulary(vocab_size: int) -> None:
    tokenizer = build_tokenizer(vocab_size)
    assert max(tokenizer.get_vocab(with_added_tokens=True).values()) < vocab_size
    assert encode(tokenizer, "<｜User｜>") == [tokenizer.token_to_id("<｜User｜>")]


def test_a_vocabulary_too_small_for_bytes_has_no_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_files(HF_TINY.vocab_size, 1) == {}
    write_tiny(tmp_path / "hf", HF_TINY)
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_the_noise_token_of_dspark_is_a_token(tmp_path: Path) -> None:
    write_tiny(tmp_path / "x", TINY_DSPARK)
    config: dict[str, Any] = json.loads((tmp_path / "x" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
    assert config["dspark_noise_token_id"] == tokenizer.token_to_id(NOISE)


def test_training_is_the_same_in_another_process() -> None:
    code = (
        "import hashlib\nfrom dsv4.synthetic.tokenizer import build_tokenizer\n"
        f"print(hashlib.sha256(build_tokenizer({ODD.vocab_size}).to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    here = build_tokenizer(ODD.vocab_size).to_str().encode()
    assert other.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_transformers_reads_it_alike(directory: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == encode(tokenizer, text), text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
