"""An answer whose reasoning is a request of its own: bounded, closed, and followed by the answer proper.

Used for a reasoning budget, and where the answer must have a form: a grammar would forbid the reasoning, so
it holds from the closing tag on. The engine has no notion of either. The second prompt is text and is
tokenised afresh, so it does not matter which tokens the model wrote its tags with.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from hrwkv.engine.request import Event, SamplingParams
from hrwkv.server.errors import refusing
from hrwkv.server.service import Answer, Service
from hrwkv.server.template import Rendered, closing

# A request whose time is over still needs some to be told so.
SOON = 0.001


@dataclass(frozen=True)
class Plan:
    """prompt: with opened reasoning. budget: reasoning tokens at most, None: no limit.

    prefix: opens the answer, after the closing tag.
    """

    prompt: Rendered
    params: SamplingParams
    budget: int | None
    prefix: str = ""
    priority: int = 0

    @property
    def tags(self) -> tuple[str, str]:
        """Around the reasoning."""
        assert self.prompt.tags is not None
        return self.prompt.tags

    def first(self) -> SamplingParams:
        """How the reasoning is written."""
        limits = [limit for limit in (self.params.max_tokens, self.budget) if limit is not None]
        return replace(
            self.params,
            max_tokens=min(limits, default=None),
            min_tokens=0,
            stop=(*self.params.stop, self.tags[1]),
            grammar=None,
        )


class ReasonedAnswer:
    """Events of both requests as if they were one; the text of the first ends with the closing tag."""

    def __init__(self, service: Service, plan: Plan, *, first: Answer) -> None:
        self._service, self._plan, self._request = service, plan, first
        self._cancelled, self._started = False, time.monotonic()

    def cancel(self) -> None:
        """Drop whichever request runs, and start no other."""
        self._cancelled = True
        self._request.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Raises EngineError, QueueFullError too: the answer proper waits in line like any request."""
        text = ""
        async for event in self._request:
            text += event.text
            if event.finish_reason is None or self._is_end(event):
                yield event
                continue
            yield replace(
                event, text=event.text + closing(self._plan.tags), finish_reason=None, stop_reason=None
            )
            async for following in self._answer(text.rstrip(), event):
                yield following

    def _is_end(self, event: Event) -> bool:
        """True if nothing can follow: the model ended its answer, or the whole answer's tokens are spent."""
        maximum = self._plan.params.max_tokens
        if maximum is not None and event.usage.completion_tokens >= maximum:
            return True
        closed = event.stop_reason == self._plan.tags[1]
        return (
            self._cancelled
            or event.finish_reason == "abort"
            or (event.finish_reason == "stop" and not closed)
        )

    async def _answer(self, reasoning: str, end: Event) -> AsyncIterator[Event]:
        plan, spent = self._plan, end.usage.completion_tokens
        text = plan.prompt.text + reasoning + closing(plan.tags) + plan.prefix
        prompt = await self._service.encode(text, special=False)
        maximum = plan.params.max_tokens
        rest = None if maximum is None else maximum - spent
        if len(prompt) >= self._service.engine.max_context:
            yield replace(end, text="", tokens=(), logprobs=(), finish_reason="length", stop_reason=None)
            return
        least = plan.params.min_tokens if rest is None else min(plan.params.min_tokens, rest)
        params = replace(plan.params, max_tokens=rest, min_tokens=least)
        # Before requests that have not begun: its reader is already reading.
        left = self._service.settings.request_seconds - (time.monotonic() - self._started)
        self._request = await self._service.submit(
            prompt, params, priority=plan.priority - 1, seconds=max(left, SOON), param="messages"
        )
        if self._cancelled:
            self._request.cancel()
        async for event in self._request:
            completion = spent + event.usage.completion_tokens
            yield replace(event, usage=replace(end.usage, completion_tokens=completion))


async def submit(service: Service, plan: Plan) -> Answer:
    """The plan's answer. Raises like ``Service.submit``."""
    if plan.params.grammar is not None:  # now, and not when the reasoning is written
        await service.check_form(plan.params.grammar)
    with refusing("stop"):
        params = plan.first()
    prompt = await service.encode(plan.prompt.text, special=False, param="messages")
    first = await service.submit(prompt, params, priority=plan.priority, param="messages")
    return ReasonedAnswer(service, plan, first=first)
