"""Ids become one choice of an answer: the recipe's parser, and what it said, to be found again."""

from __future__ import annotations

import json
from array import array
from typing import Any

from deepseek_recipe import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ConversationRequest,
    InferenceChunk,
    InferenceFinishReason,
    PromptUsage,
    StreamProcessor,
    Tokenizer,
)

from dsv4.serve.jobs import Event, Finish
from dsv4.serve.replay import Call, Said

_FINISH = {Finish.STOP: InferenceFinishReason.Stop, Finish.LENGTH: InferenceFinishReason.Length}


class Answer:
    """One choice. ids: all that were drawn. stopped: whether a stop string ended it; done: whether
    anything did.
    """

    def __init__(
        self,
        request: ConversationRequest,
        generator: Any,
        tokenizer: Tokenizer,
        unspoken: frozenset[int],
        *,
        logprobs: bool,
    ) -> None:
        """unspoken: ids without text, which the parser would spell."""
        self._request, self._tokenizer, self._unspoken = request, tokenizer, unspoken
        self._parser = StreamProcessor(generator, request.parsing_options, tokenizer)
        self._logprobs = logprobs
        self.ids: array[int] = array("i")
        self.stopped = self.done = False

    def open(self, prompt: int, cached: int, fingerprint: str) -> list[Any]:
        """What comes before the first token."""
        usage = PromptUsage(prompt_tokens=prompt, prompt_cache_hit_tokens=cached)
        ready = InferenceChunk.ready(prompt_usage=usage, system_fingerprint=fingerprint)
        return list(self._parser.push(ready))

    def feed(self, event: Event) -> list[Any]:
        """What an event adds; nothing once it is done."""
        if self.done:
            return []
        chunks: list[Any] = []
        spoken = [i for i, token in enumerate(event.tokens) if token not in self._unspoken]
        self.ids.extend(event.tokens[i] for i in spoken)
        for i in spoken:
            # One by one: a stop string may end it at any of them.
            told = [(event.logprobs[i].logprob, event.logprobs[i].top)] if self._logprobs else None
            chunks += self._parser.push(InferenceChunk.tokens([event.tokens[i]], told))
            if self._parser.finished:
                self.stopped = self.done = True
                return chunks
        if event.finish in _FINISH:
            chunks += self._parser.push(InferenceChunk.finish(_FINISH[event.finish]))
            chunks += self._parser.finish()
            self.done = True
        return chunks

    def said(self) -> Said:
        """It in the recipe's words; not for one that a stop string ended."""
        request = self._request
        generator = ChatCompletionRequest.chunk_generator(request, "", "")
        parser = StreamProcessor(generator, request.parsing_options, self._tokenizer)
        response = ChatCompletionResponse("", "", 0, 0, 0)
        chunks = parser.push(InferenceChunk.ready())
        chunks += parser.push(InferenceChunk.tokens(list(self.ids)))
        chunks += parser.push(InferenceChunk.finish(InferenceFinishReason.Stop))
        for chunk in [*chunks, *parser.finish()]:
            response.accumulate(chunk)  # type: ignore[arg-type]
        message = json.loads(response.to_json())["choices"][0]["message"]
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        return Said(
            message.get("content") or "",
            message.get("reasoning_content") or "",
            tuple(Call(call["name"], call["arguments"]) for call in calls),
            self.ids,
            request.parsing_options.thinking_initial_stage is not None,
        )
