"""A store as the faces see it: its texts, its names, its settings; read before any weight is."""

from __future__ import annotations

import dataclasses
import functools

from deepseek_recipe import ConversionOptions, ModelVersion, Tokenizer

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.settings import GenerationSettings
from dsv4.formats.store.text_files import stored_text_files
from dsv4.formats.version import VERSION
from dsv4.runtime.text.chat import stop_ids
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.grammars import Grammars
from dsv4.serve.refusal import Refusal

TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """names: what requests may call it, the first one is what answers say. vocab: rows of the head.

    tokenizer: the recipe's, for its parser. fingerprint: of the store and this program. thinks:
    whether a request that says nothing reasons, with `effort`. notices: sentences for the operator.
    """

    names: tuple[str, ...]
    text: Text
    tokenizer: Tokenizer
    tokenizer_json: bytes
    settings: GenerationSettings
    stop_ids: frozenset[int]
    vocab: int
    max_positions: int
    fingerprint: str
    thinks: bool
    effort: str
    notices: tuple[str, ...]

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Made on first use: a real tokenizer takes a second."""
        return Grammars(self.tokenizer_json, self.text, self.vocab, self.stop_ids)

    @functools.cached_property
    def options(self) -> ConversionOptions:
        """For the recipe's conversion of requests, whose model name is the first one."""
        options = ConversionOptions(default_thinking_mode=self.thinks)
        return options.with_model_alias(self.names[0], ModelVersion.DeepseekV4Pro)

    def check_name(self, name: object) -> None:
        """Raises Refusal 404 for a model that is not served; nothing said is the first one."""
        if name is None:
            return
        # Claude Code marks a model with a long context so.
        if not isinstance(name, str) or name.removesuffix("[1m]") not in self.names:
            raise Refusal(
                404,
                f"the model {name!r} does not exist here, expected {' or '.join(self.names)}",
                param="model",
                code="model_not_found",
            )


def open_model(
    packed: PackedCheckpoint, names: tuple[str, ...], *, effort: str = "high"
) -> ServedModel:
    """Read the store's text files. names: none is the store's own. effort: of requests that say
    nothing; "none" is no reasoning.

    Raises StoreError for a text file that cannot be used, RuntimeRefusal where there is no
    tokenizer.
    """
    found, store = stored_text_files(packed), packed.store
    if found.tokenizer is None:
        raise RuntimeRefusal(
            "the store carries no tokenizer.json, which a server needs; convert a source that has "
            "one"
        )
    text = Text(found.tokenizer)
    raw = store.assets[TOKENIZER_FILE].read_bytes()
    return ServedModel(
        names or (packed.name,),
        text,
        Tokenizer.from_str(raw.decode()),
        raw,
        found.settings,
        stop_ids(found.settings.eos_token_ids, text),
        packed.config.vocab_size,
        packed.config.max_position_embeddings,
        f"{str(store.manifest['root'])[:12]}-{VERSION}",
        effort != "none",
        effort,
        (*found.tokenizer_notices, *found.settings.notices()),
    )
