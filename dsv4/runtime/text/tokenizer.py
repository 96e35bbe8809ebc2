"""Text to token ids and back, by the checkpoint's own `tokenizer.json`.

Two ways in. `encode` knows the added vocabulary: the spelling of a special token in the text
becomes that token. `encode_plain` does not, so text from outside cannot forge one. The latter
is the same model without its added tokens, because the library's own switch
(`encode_special_tokens`) spares added tokens that are not flagged special, and DeepSeek's
tokenizers so far left `<｜User｜>` and `<think>` unflagged.

One way out, at once (`decode`) or as tokens come (`stream`). A token of a byte-level BPE may
end inside a character; the stream holds such bytes back until the character is whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dsv4.formats.errors import RuntimeRefusal, StoreError

_BAR = "｜"  # in the spelling of DeepSeek's special tokens, but for two
_REASONING = ("<think>", "</think>")


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """By the library's call for many texts: unlike `encode` it lets other threads run meanwhile, a
    megabyte would hold them for more than a second; and it leaves out what nobody asked for.
    """
    (found,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = found.ids
    return ids


class Text:
    """A tokenizer. Ids are ints, text is str; nothing is added to either (no BOS, no EOS)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A tokenizer.json may carry both, and either would change a prompt without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._plain = Tokenizer(tokenizer.model)  # shares the vocabulary, does not copy it
        if tokenizer.normalizer is not None:
            self._plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.pre_tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> Text:
        """Read a `tokenizer.json`. Raises StoreError when it is missing or malformed."""
        if not Path(path).is_file():
            raise StoreError(
                f"{path}: no such file, expected the checkpoint's tokenizer.json; "
                "copy it there from the source"
            )
        try:
            return cls(Tokenizer.from_buffer(Path(path).read_bytes()))
        except Exception as error:  # the library raises bare Exception
            raise StoreError(
                f"{path}: not a tokenizer.json that the tokenizers library can read ({error}); "
                "copy it again from the source"
            ) from None

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; rows of the head from here on mean nothing."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def marks(self) -> frozenset[int]:
        """Ids of special tokens, which are structure and not text.

        Those flagged special, and DeepSeek's own, of which only some are flagged.
        """
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(
            number
            for number, token in added
            if token.special or _BAR in token.content or token.content in _REASONING
        )

    def token_id(self, spelling: str) -> int | None:
        """The id of the token spelt exactly so, None when there is none."""
        return self._tokenizer.token_to_id(spelling)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, in which spellings of added tokens count as those tokens.

        Raises RuntimeRefusal when `text` is not valid Unicode.
        """
        check_unicode(text)
        return _ids(self._tokenizer, text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` as mere characters: no added token can come out.

        Raises RuntimeRefusal when `text` is not valid Unicode.
        """
        check_unicode(text)
        return _ids(self._plain, text)

    def decode(self, ids: Sequence[int], *, show_special: bool = False) -> str:
        """The text of `ids`; tokens flagged special are left out unless `show_special`.

        Bytes that are not UTF-8 come out as U+FFFD.
        """
        return self._tokenizer.decode(ids, skip_special_tokens=not show_special)

    def spoken(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids: `decode` without any special token."""
        return self.decode([token for token in ids if token not in self.marks])

    def stream(self, *, show_special: bool = False) -> TextStream:
        """A detokeniser for ids that come one by one; what it gives adds up to `decode`."""
        return TextStream(self._tokenizer, show_special)


class TextStream:
    """Turns ids into text as they come, in whole characters only."""

    def __init__(self, tokenizer: Tokenizer, show_special: bool) -> None:
        self._tokenizer = tokenizer
        self._hide_special = not show_special
        self._stream = DecodeStream(skip_special_tokens=self._hide_special)
        self._held: list[int] = []  # ids whose text has not come out yet

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        self._held.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """The text still held back, an unfinished character as U+FFFD. Starts afresh."""
        text = self._tokenizer.decode(self._held, skip_special_tokens=self._hide_special)
        self._held.clear()
        self._stream = DecodeStream(skip_special_tokens=self._hide_special)
        return text


def check_unicode(text: str) -> None:
    """Refuse a str that has no UTF-8 form: a terminal may hand over lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RuntimeRefusal(
            f"the text is not valid Unicode at character {error.start}; "
            "is the terminal's encoding UTF-8?"
        ) from None
