"""Grammars in llguidance's Lark, of JSON by a schema and of DSML tool calls, and their matchers.

A special token stands in a grammar by its id, so text can never spell one. A parameter's value ends
with `</` before the token ｜DSML｜; everything else in it, `</` included, is text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import torch
from deepseek_recipe import SpecialToken, ToolDefinition
from torch import Tensor

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.refusal import invalid

MAX_SCHEMA_CHARACTERS = 256 * 1024
MAX_COMPILED = 32  # grammars that are kept
_DSML = SpecialToken.Dsml.default_str()


class Grammars:
    """Compiles grammars for one tokenizer. May be used from any thread.

    tokenizer_json: as the checkpoint has it. vocab: rows of the model's head. stop_ids: what ends
    an answer.
    """

    def __init__(
        self, tokenizer_json: bytes, text: Text, vocab: int, stop_ids: Collection[int]
    ) -> None:
        document = json.loads(tokenizer_json)
        for token in document["added_tokens"]:
            # DeepSeek's tokenizers leave most marks unflagged, and they would be text here.
            token["special"] = token["id"] in text.marks
        self.vocab = vocab
        self._tokenizer = llguidance.LLTokenizer(
            json.dumps(document, ensure_ascii=False), n_vocab=vocab, eos_token=sorted(stop_ids)
        )
        self.dsml = text.token_id(_DSML)
        # An agent asks with the same tools again and again.
        self._compiled = functools.lru_cache(MAX_COMPILED)(self._compile)

    def compile(self, lark: str, field: str) -> Grammar:
        """Raises Refusal 400 naming `field` for a schema that cannot be a grammar."""
        if len(lark) > MAX_SCHEMA_CHARACTERS:
            raise invalid(field, f"{field} is longer than {MAX_SCHEMA_CHARACTERS} characters")
        matcher = self._compiled(lark)
        if matcher.is_error():
            shown = " ".join(matcher.get_error().split())[:300]
            raise invalid(field, f"{field} cannot be made a grammar: {shown}")
        return Grammar(matcher, self.vocab)

    def _compile(self, lark: str) -> llguidance.LLMatcher:
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)


class Grammar:
    """One that was compiled."""

    def __init__(self, beginning: llguidance.LLMatcher, vocab: int) -> None:
        self._beginning, self._vocab = beginning, vocab

    def matcher(self) -> Matcher:
        """At the grammar's beginning."""
        return Matcher(self._beginning.deep_copy(), self._vocab)


class Matcher:
    """A `Constraint`: one text on its way through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def mask(self) -> Tensor:
        """bool `[vocab]`: what may come next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, count=min(self._vocab, 8 * len(packed)), bitorder="little")
        mask = torch.zeros(self._vocab, dtype=torch.bool)
        mask[: len(bits)] = torch.from_numpy(bits).bool()
        return mask

    def took(self, token: int) -> None:
        """Raises RuntimeError for a token that the grammar does not have there."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not go on with token {token}")

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())


def json_rule(name: str, schema: str) -> str:
    """A rule of JSON by `schema`; "" is any object."""
    return f"{name}: %json {schema or json.dumps({'type': 'object'})}\n"


def calls_rule(
    name: str, tools: Sequence[ToolDefinition], dsml: int, *, several: bool, after_mark: bool
) -> str:
    """Rules for a block of calls of `tools`. several: one call or more, else exactly one.

    after_mark: the block's `<｜DSML｜` was drawn already.
    """
    mark = f"<[{dsml}]>"
    rules = [f'invoke: "<" {mark} "invoke name=" call "</" {mark} "invoke>\\n"\n']
    heads = []
    for number, tool in enumerate(tools):
        heads.append(f"call_{number}")
        rules += _call(f"call_{number}", tool, mark)
    invokes = "invoke+" if several else "invoke"
    begin = "" if after_mark else f'/\\n{{0,2}}/ "<" {mark} '
    rules += [
        f'{name}: {begin}"tool_calls>\\n" {invokes} "</" {mark} "tool_calls>"\n',
        f"call: {' | '.join(heads)}\n",
        "VALUE: /(?s:.*)<\\//\n",
        'NAME: /[^"<>\\n]+/\n',
    ]
    return "".join(rules)


def _call(name: str, tool: ToolDefinition, mark: str) -> Iterator[str]:
    schema = tool.parameters if isinstance(tool.parameters, Mapping) else {}
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = schema.get("properties")
    parameters = []
    for number, (key, value) in enumerate(
        properties.items() if isinstance(properties, Mapping) else ()
    ):
        parameter = f"{name}_{number}"
        yield from _parameter(parameter, key, value, shared, mark)
        parameters.append((parameter, key in (schema.get("required") or ())))
    head = _quoted(json.dumps(tool.name, ensure_ascii=False) + ">\n")
    if not parameters:
        # No word on what it takes: names and kinds are the model's.
        yield f'{name}: {head} {name}_any*\n{name}_any: "<" {mark} "parameter name=\\"" NAME '
        yield f'({_TEXT} VALUE {mark} | {_JSON} {name}_json "</" {mark}) "parameter>\\n"\n'
        yield f"{name}_json: %json {{}}\n"
    elif tool.strict:
        body = " ".join(one if needed else f"{one}?" for one, needed in parameters)
        yield f"{name}: {head} {body}\n"
    else:
        yield f"{name}: {head} ({' | '.join(one for one, _ in parameters)})*\n"


_TEXT = '"\\" string=\\"true\\">"'
_JSON = '"\\" string=\\"false\\">"'


def _parameter(
    name: str, key: str, schema: Any, shared: Mapping[str, Any], mark: str
) -> Iterator[str]:
    text, other = _kinds(schema)
    begin = f'{name}: "<" {mark} {_quoted("parameter name=" + json.dumps(key)[:-1])} '
    ways = [f"{_TEXT} VALUE {mark}"] if text else []
    if other:
        ways.append(f'{_JSON} {name}_json "</" {mark}')
        whole = {**shared, **schema} if isinstance(schema, Mapping) else {}
        yield f"{name}_json: %json {json.dumps(whole, ensure_ascii=False)}\n"
    yield f'{begin}({" | ".join(ways)}) "parameter>\\n"\n'


def _kinds(schema: Any) -> tuple[bool, bool]:
    """Whether a value may be a text, and whether it may be something else."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string" and not {"enum", "const", "pattern", "format"} & set(schema):
        return True, False
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is None or "string" in kinds:
        return True, True
    return False, True


def _quoted(text: str) -> str:
    """A string of Lark."""
    return json.dumps(text, ensure_ascii=False)
