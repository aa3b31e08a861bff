"""What every route needs: the engine, the model's name and habits, the way of a prompt into the engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from hrwkv.engine.request import Event, Grammar, SamplingParams
from hrwkv.server.errors import ApiError, refusing
from hrwkv.server.params import Defaults
from hrwkv.server.template import ChatFormat
from hrwkv.settings import ServeSettings

if TYPE_CHECKING:
    from hrwkv.engine.engine import Engine

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# Long texts are tokenised beside the event loop; two at a time, so that one of them stops no other request.
TOKENIZER_THREADS = 2
# A text is refused unread only if it is so many times longer than any prompt: tokenizers may shorten it.
SLACK = 4


class Answer(Protocol):
    """One prompt's way through the engine; the engine's own requests are one."""

    def cancel(self) -> None:
        """Let the engine drop it; any number of times, from any thread."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Its events as they come; raises EngineError and GrammarError."""


async def started(answer: Answer) -> AsyncIterator[Event]:
    """An answer's events. Raises ApiError 503 if its time was over, or the engine closed, before it began."""
    async for event in answer:
        if event.finish_reason == "abort" and not event.usage.completion_tokens:
            raise ApiError(503, "the request was not begun in its time: come again later", code="timeout")
        yield event


@dataclass(frozen=True)
class Service:
    """One model behind HTTP. ``draining`` is set when the server is told to stop."""

    engine: Engine
    settings: ServeSettings
    name: str
    defaults: Defaults
    chat: ChatFormat
    created: int = field(default_factory=lambda: int(time.time()))
    draining: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
    )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's."""
        return self.engine.tokenizer

    @property
    def vocab_size(self) -> int:
        """Ids that the model can read and write."""
        return int(self.engine.model_config.vocab_size)

    @property
    def max_prompt(self) -> int:
        """Tokens of a prompt at most; its answer needs room as well, which the engine looks after."""
        limit, context = self.settings.max_prompt_tokens, int(self.engine.max_context)
        return context if limit is None else min(limit, context)

    @cached_property
    def _longest_token(self) -> int:
        """Characters."""
        return max(len(token) for token in self.tokenizer.get_vocab())

    @property
    def is_ready(self) -> bool:
        """True while new requests are taken."""
        return self.engine.is_alive and not self.draining.is_set()

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 for another model's name; an empty one takes what there is."""
        if name not in ("", self.name):
            message = f"there is no model {name!r} here, expected {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, function: Callable[[], Result]) -> Result:
        """What would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def encode(self, text: str, *, special: bool, param: str = "prompt") -> list[int]:
        """Token ids of a text; ``special`` adds those that begin a text. Raises ApiError 400."""
        limit = SLACK * self._longest_token * self.max_prompt
        if len(text) > limit:
            message = f"{param} has {len(text)} characters, more than {self.max_prompt} tokens can hold"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            message = f"{param} has half of a surrogate pair, expected whole characters"
            raise ApiError(400, message, param=param) from error
        with refusing(param):
            return await self.in_thread(lambda: self._encode(text, special=special))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        ids: Any = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return list(ids)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""
        return await self.in_thread(lambda: str(self.tokenizer.decode(list(tokens))))

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        seconds: float | None = None,
        param: str = "prompt",
    ) -> Answer:
        """A prompt into the engine's line; seconds: that it has, None: those of a whole request.

        Raises ApiError 400, about the field ``param``, for what does not fit, QueueFullError and EngineError.
        """
        self.check_length(len(prompt), param)
        deadline = self.settings.request_seconds if seconds is None else seconds
        submit = partial(self.engine.submit, prompt, params, priority=priority, deadline=deadline)
        with refusing(param):
            # Making a grammar may take long, and other threads than the tokenizer's may wait for it.
            return submit() if params.grammar is None else await asyncio.to_thread(submit)

    async def check_form(self, grammar: Grammar) -> None:
        """Raise ApiError 400 for a form that no answer could have."""
        with refusing():
            await asyncio.to_thread(self.engine.check_grammar, grammar)

    def check_length(self, tokens: int, param: str = "prompt") -> None:
        """Raise ApiError 400 for a prompt of so many tokens, if it is too long."""
        if tokens > self.max_prompt:
            message = f"the prompt has {tokens} tokens, expected at most {self.max_prompt}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    async def submit_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, priority: int
    ) -> list[Answer]:
        """Several prompts, all of them or none."""
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answers.append(await self.submit(prompt, params, priority=priority))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def check_choices(self, prompts: int, n: int) -> None:
        """Raise ApiError 400 for more answers than a request may have."""
        if prompts * n > self.settings.max_choices:
            came = f"n is {n}" if prompts == 1 else f"{prompts} prompts with n {n}"
            message = f"{came}, expected at most {self.settings.max_choices} answers"
            raise ApiError(400, message, param="n")

    def priority(self, given: int | None) -> int:
        """A request's place in the line. Raises ApiError 400 where it is not the client's to choose."""
        if given is not None and not self.settings.allow_priority:
            raise ApiError(400, "priority is not open to clients here: leave it out", param="priority")
        return given or 0

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)
