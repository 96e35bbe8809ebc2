"""A small tokenizer of the real kind: byte-level BPE, DeepSeek's splits and DeepSeek's markers.

Ids: the three special tokens, the 256 bytes, merges learned from the text below, then the chat
markers and placeholders, which are added tokens but not special (decoding keeps them). Any text
round-trips, because every byte has an id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import processors as post_processors

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
NOISE = "<｜place▁holder▁no▁799｜>"  # what DSpark fills its draft slots with
MARKERS = (
    NOISE,
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
    "<｜image｜>",
)
BYTES = 256
MIN_VOCABULARY = 3 + BYTES + len(MARKERS)
UNUSED_ROWS = 8  # as in the release, the embedding has rows no token uses

DIGITS = r"\p{N}{1,3}"
CJK = r"[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = '''\
The river left the mountain before the mountain had a name. It carried stones, then sand, then
only light, and where it met the sea it forgot which water had been its own. People came and
counted the days between floods. They built a bridge, and the bridge made a road, and the road
made a market where bread was sold for salt and salt for stories. Nobody owned the stories, so
they travelled the farthest. A child who heard one about the river asked where it began. Her
grandmother pointed upward, to the snow. Where does the snow begin? In the sea, she said, and the
child laughed, because it was true and because it sounded like the end of a story.
The capital of France is Paris. Water boils at one hundred degrees. Two plus two is four.
What is the answer to this question? Please think about it, and then write the answer here.
Hello, world! How are you today? I am reading; you are writing. Thank you, and good night.
Ein Fluss hat keine Eile. Le fleuve ne se presse pas. El río no tiene prisa. Река не спешит.
你好，世界。河流没有名字的时候，山已经在那里了。请写出答案。今天天气很好，我们去看河。
水从雪中来，雪从海中来，海从河中来。これは短い物語です。川は海へ行きます。ありがとう。
A miller kept a wheel in the water and said the river worked for him. The river said nothing, and
in spring it took the wheel. He carved another, larger one, and a neighbour held the rope. Between
them they learned when to open the gate and when to leave it shut, which is most of what anybody
ever learns. Winter came with wolves and letters. Some letters asked for money, others for patience.
def average(numbers):
    """Return the mean of the numbers, or zero if the list is empty."""
    return sum(numbers) / len(numbers) if numbers else 0.0
for index in range(128):
    if index % 4 == 0:
        print(index, values[index], sum(values[:index]))
def largest(values, start=0):
    return max(value for value in values if value is not None)
{"name": "river", "length": 6300, "unit": "km", "tributaries": ["north", "south", "east"]}
<html><body class="page"><p>text</p></body></html> https://example.org/index.html?q=1&lang=en
0 1 2 3 4 5 6 7 8 9 10 12 16 24 32 48 64 96 100 128 256 512 1000 1024 2048 4096 8192 65536
'''


def build_tokenizer(vocab_size: int, texts: Iterable[str] = (CORPUS,)) -> Tokenizer:
    """A tokenizer whose ids are all below `vocab_size`, which is at least MIN_VOCABULARY.

    texts: what the merges are learned from; equal texts give an equal tokenizer.
    """
    spare = UNUSED_ROWS if vocab_size >= MIN_VOCABULARY + UNUSED_ROWS else 0
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in (DIGITS, CJK, WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = post_processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS) - spare,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKERS])
    return tokenizer


def tokenizer_files(vocab_size: int, max_length: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json; none when the vocabulary cannot hold all bytes."""
    if vocab_size < MIN_VOCABULARY:
        return {}
    return files_of(build_tokenizer(vocab_size), max_length)


def files_of(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json of a tokenizer that `build_tokenizer` made."""
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": max_length,
        "pad_token": PAD,
        # The releases name LlamaTokenizerFast, with which transformers 5 drops spaces.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
