"""Pieces of an answer to a client: as server-sent events or as one body, and no longer than it listens."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hrwkv.engine.request import Usage
from hrwkv.server.errors import ApiError, api_error
from hrwkv.server.service import Answer, Service

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
CLIENT_GONE = 499
EVENTS, DONE = "text/event-stream", b"data: [DONE]\n\n"
# A reader gets this much longer than the engine to take what is ready.
READER_SECONDS = 30.0


@dataclass(frozen=True)
class Piece:
    """A choice of a chunk in OpenAI's form, and the tokens of its prompt's answer so far."""

    choice: dict[str, Any]
    answer: int
    usage: Usage


@dataclass
class Tally:
    """Tokens over all prompts of a request."""

    usages: dict[int, Usage] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's ``usage``."""
        prompt = sum(usage.prompt_tokens for usage in self.usages.values())
        completion = sum(usage.completion_tokens for usage in self.usages.values())
        cached = sum(usage.cached_tokens for usage in self.usages.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    kind: begins its id. chunk, whole: the ``object`` of a chunk and of a whole answer. pieces: the answer.
    fold: all pieces' choices -> the choices of a whole answer. answers: what to cancel when nobody listens.
    """

    service: Service
    kind: str
    chunk: str
    whole: str
    pieces: AsyncIterator[Piece]
    fold: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]
    answers: Sequence[Answer]
    tally: Tally = field(default_factory=Tally)
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=lambda: time.monotonic())
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def respond(self, request: Request, *, stream: bool, include_usage: bool) -> Response:
        """The response. Raises ApiError and EngineError for a failure before anything is sent."""
        try:
            if not stream:
                return await self._respond_whole(request)
            # The first piece is waited for, so that a failure until then has an HTTP status.
            first = await unless_gone(request, anext(self.pieces))
        except BaseException:
            self._cancel()
            raise
        seconds = self.service.settings.request_seconds + READER_SECONDS
        return EventStream(self._events(first, include_usage=include_usage), seconds, on_end=self._cancel)

    async def _respond_whole(self, request: Request) -> Response:
        choices = await unless_gone(request, self._collect())
        body = self._head(self.whole) | {"choices": self.fold(choices), "usage": self.tally.body()}
        self._log()
        return Response(to_json(body), media_type="application/json")

    async def _collect(self) -> list[dict[str, Any]]:
        return [self._counted(piece) async for piece in self.pieces]

    async def _events(self, first: Piece, *, include_usage: bool) -> AsyncIterator[bytes]:
        head = self._head(self.chunk)
        # With include_usage every chunk has the field, null in all but the last.
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            yield event(head | {"choices": [self._counted(first)]} | usage)
            async for piece in self.pieces:
                yield event(head | {"choices": [self._counted(piece)]} | usage)
            if include_usage:
                yield event(head | {"choices": [], "usage": self.tally.body()})
        except Exception as error:
            yield event(api_error(error).body())
        yield DONE
        self._log()

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.kind}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.service.name,
        }

    def _counted(self, piece: Piece) -> dict[str, Any]:
        self.tally.usages[piece.answer] = piece.usage
        return piece.choice

    def _cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()

    def _log(self) -> None:
        usage = self.tally.body()
        tokens = f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        logger.info("%s-%s: %s in %.2f s", self.kind, self.number, tokens, time.monotonic() - self.started)


class EventStream(StreamingResponse):
    """Server-sent events; ``on_end`` runs however it ends, a client that went away included.

    A client that has not read everything after ``seconds`` is cut off.
    """

    media_type = EVENTS

    def __init__(self, content: AsyncIterator[bytes], seconds: float, *, on_end: Callable[[], None]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._seconds, self._on_end = seconds, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("cut off a reader that has not read its answer after %.0f s", self._seconds)
        finally:
            self._on_end()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What ``work`` gives; raises ApiError 499, which nobody reads, as soon as the client is gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def to_json(value: Any) -> bytes:
    """UTF-8 JSON. Half a surrogate pair, which a model can spell, is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def event(value: dict[str, Any]) -> bytes:
    """A server-sent one."""
    return b"data: " + to_json(value) + b"\n\n"
