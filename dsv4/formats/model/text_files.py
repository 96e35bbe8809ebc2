"""The small files that travel with a checkpoint and decide what `run` makes of text.

tokenizer.json, tokenizer_config.json and generation_config.json are read here and nowhere else:
what `run` would refuse of a packed store is refused of its source, before any weight is moved.

Of tokenizer_config.json `eos_token` is used, as one more end of an answer. The tokenizer and its
special tokens are tokenizer.json's, chats are rendered by DeepSeek's own encoder, and nothing is
added to a raw prompt; fields that ask for something else are named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsv4.formats.errors import ConfigError, Dsv4Error
from dsv4.formats.file_kinds import misfit
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.settings import GENERATION_FILE, GenerationSettings
from dsv4.formats.plain_text import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEXT_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, GENERATION_FILE)
MAX_SHOWN = 200
TOKENS_SHOWN = 5

_UNUSED_FLAGS = {
    "add_bos_token": " (a chat begins with the token, --raw does not add it)",
    "add_eos_token": "",
    "add_prefix_space": "",
    "clean_up_tokenization_spaces": "",
    "do_lower_case": "",
    "split_special_tokens": "",
}
"""Fields of tokenizer_config.json that ask for something when true, which is not done."""


class TextFileError(ConfigError):
    """A file that travels along cannot be used. file: its name."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(problem)
        self.file = file

    def __reduce__(self) -> tuple[type[TextFileError], tuple[str, str]]:
        return type(self), (self.file, str(self))


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """What `run` needs besides weights.

    settings: eos_token_ids includes the tokenizer's own. tokenizer: None where there is no
    tokenizer.json. notices: sentences on what the files ask for in vain, or lack.
    """

    settings: GenerationSettings
    tokenizer: Tokenizer | None
    tokenizer_notices: tuple[str, ...] = ()

    @property
    def notices(self) -> tuple[str, ...]:
        """All that is worth knowing, when the text is drawn as the checkpoint asks."""
        return (*self.tokenizer_notices, *self.settings.notices())


def read_text_files(files: Mapping[str, bytes], config: ModelConfig) -> TextFiles:
    """Read those of TEXT_FILES that are there. files: name -> content; others are not looked at.

    Raises TextFileError naming the file, what is wrong, and what was expected.
    """
    for name in TEXT_FILES:
        if name in files and (problem := misfit(name, files[name], json=True)):
            raise TextFileError(name, problem)
    raw = files.get(TOKENIZER_FILE)
    tokenizer = None if raw is None else read_tokenizer(raw)
    asked = _tokenizer_config(files.get(TOKENIZER_CONFIG_FILE))
    try:
        settings = GenerationSettings.from_json(files.get(GENERATION_FILE), config)
    except Dsv4Error as error:
        raise TextFileError(GENERATION_FILE, str(error)) from None
    if tokenizer is None:
        return TextFiles(settings, None, tuple(_unused(asked, config)))
    end = _token(asked.get("eos_token"), "eos_token")
    token = None if end is None else tokenizer.token_to_id(end)
    if token is not None:
        ids = tuple(sorted({*settings.eos_token_ids, token}))
        settings = dataclasses.replace(settings, eos_token_ids=ids)
    notices = [*_gaps(tokenizer, config), *_strangers(tokenizer, asked), *_unused(asked, config)]
    if end is not None and token is None:
        notices.append(
            f"{TOKENIZER_CONFIG_FILE}: eos_token {_shown(end)} is not a token of {TOKENIZER_FILE}, "
            "so it does not end an answer"
        )
    return TextFiles(settings, tokenizer, tuple(notices))


def read_tokenizer(raw: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises TextFileError."""
    from tokenizers import Tokenizer

    if problem := misfit(TOKENIZER_FILE, raw, json=True):
        raise TextFileError(TOKENIZER_FILE, problem)
    try:
        return Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise TextFileError(
            TOKENIZER_FILE,
            f"{TOKENIZER_FILE} is not a tokenizer.json that the tokenizers library can read "
            f"({printable(str(error), MAX_SHOWN)}), expected the checkpoint's own",
        ) from None


def _tokenizer_config(raw: bytes | None) -> Mapping[str, Any]:
    """Its fields that are not null. Lenient as transformers: integers of any length are usual."""
    if raw is None:
        return {}
    try:
        document = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        problem = f"{TOKENIZER_CONFIG_FILE} is not JSON: {printable(str(error), MAX_SHOWN)}"
        raise TextFileError(TOKENIZER_CONFIG_FILE, problem) from None
    if not isinstance(document, dict):
        problem = f"{TOKENIZER_CONFIG_FILE} is {_shown(document)}, expected a JSON object"
        raise TextFileError(TOKENIZER_CONFIG_FILE, problem)
    return {name: value for name, value in document.items() if value is not None}


def _token(value: Any, field: str) -> str | None:
    """The spelling of a token, which stands alone or in an object. Raises TextFileError."""
    spelling = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(spelling, str):
        problem = f"{field} is {_shown(value)}, expected a token's text or null"
        raise TextFileError(TOKENIZER_CONFIG_FILE, f"{TOKENIZER_CONFIG_FILE}: {problem}")
    return spelling


def _gaps(tokenizer: Tokenizer, config: ModelConfig) -> Iterator[str]:
    """What the tokenizer and the model, or the chat template, do not agree on."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        yield (
            f"{TOKENIZER_FILE} has ids up to {largest}, but the model's vocabulary ends at "
            f"{config.vocab_size - 1}: `dsv4 run` refuses text with such tokens"
        )
    missing = [token for token in _template_tokens() if tokenizer.token_to_id(token) is None]
    if missing:
        yield (
            f"{TOKENIZER_FILE} has no token {missing[0]}, which DeepSeek-V4's chat template needs: "
            "`dsv4 run` needs --raw or --tokens"
        )


def _template_tokens() -> tuple[str, ...]:
    """Special tokens of a chat's first turn."""
    from deepseek_recipe import Conversation, DeepseekV4Encoding, UserMessage

    chat = Conversation([UserMessage("")], thinking_mode=False)
    rendered = DeepseekV4Encoding().render_conversation(chat)
    return tuple(rendered.prompt[begin:end] for begin, end in rendered.special_ranges)


def _strangers(tokenizer: Tokenizer, asked: Mapping[str, Any]) -> Iterator[str]:
    """Tokens that tokenizer_config.json adds and tokenizer.json has not, or has elsewhere."""
    added = asked.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return
    spelt = {number: _token(token, "added_tokens_decoder") for number, token in added.items()}
    strange = [
        f"{_shown(token)} as {printable(number, MAX_SHOWN)}"
        for number, token in spelt.items()
        if token is not None and str(tokenizer.token_to_id(token)) != number
    ]
    if strange:
        some = ", ".join(strange[:TOKENS_SHOWN]) + (", ..." if len(strange) > TOKENS_SHOWN else "")
        yield f"{TOKENIZER_CONFIG_FILE} has tokens that {TOKENIZER_FILE} lacks: {some}"


def _unused(asked: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Fields that ask for something which is not done: one sentence."""
    named = [f"{name} true{why}" for name, why in _UNUSED_FLAGS.items() if asked.get(name) is True]
    length = asked.get("model_max_length")
    if isinstance(length, int | float) and length < config.max_position_embeddings:
        named.append(f"model_max_length {length}")
    if "chat_template" in asked:
        named.append("chat_template (chats are rendered by DeepSeek's own encoder)")
    if named:
        yield f"{TOKENIZER_CONFIG_FILE} has settings that are not used: {', '.join(named)}"


def _shown(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), MAX_SHOWN)
