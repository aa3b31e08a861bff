"""``Request``: the reader's end of an answer, sync or async, filled by the engine's thread.

Events that nobody has read yet are joined when somebody does, so the engine's thread pays the same for each,
however slow its reader is. An asyncio reader is woken in its own loop; nothing polls.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain

from hrwkv.engine.request import Event


class Request:
    """One submitted request: iterate over it once, from any thread or asyncio loop, for its events.

    An iterator ends after the last event of the last choice, and raises EngineError if the engine failed,
    GrammarError if the text's grammar did.
    """

    def __init__(self, id: int, num_choices: int, *, cancel: Callable[[int], None]) -> None:
        self.id = id
        self._cancel = cancel
        self._open = num_choices
        self._pending: dict[int, list[Event]] = {}  # unread ones of each choice, the oldest choice first
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Event]:
        while (event := self._take(waits=True)) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # a closed loop has no reader any more
                loop.call_soon_threadsafe(ready.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            while True:
                ready.clear()
                event = self._take(waits=False)
                if event is not None:
                    yield event
                elif self.is_done:
                    return
                else:
                    await ready.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)

    @property
    def is_done(self) -> bool:
        """True if no event will come any more, and none waits to be read."""
        with self._changed:
            return not self._pending and not self._open and self._error is None

    def cancel(self) -> None:
        """End what is unfinished with finish_reason "abort"; from any thread, at any time, again too."""
        self._cancel(self.id)

    def put(self, event: Event) -> None:
        """Called by the engine: an event for the reader."""
        with self._changed:
            self._pending.setdefault(event.index, []).append(event)
            self._open -= event.finish_reason is not None
            self._notify()

    def fail(self, error: Exception) -> None:
        """Called by the engine: no more events; the reader gets the error after those that wait."""
        with self._changed:
            self._error, self._open = error, 0
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for wake in self._wakers:
            wake()

    def _take(self, *, waits: bool) -> Event | None:
        with self._changed:
            while waits and not self._pending and self._open:
                self._changed.wait()
            if not self._pending:
                if self._error is not None:
                    raise self._error
                return None
            events = self._pending.pop(next(iter(self._pending)))
        return join(events)


def join(events: Sequence[Event]) -> Event:
    """Successive events of one choice, at least one, as one."""
    return replace(
        events[-1],
        text="".join(event.text for event in events),
        tokens=tuple(chain.from_iterable(event.tokens for event in events)),
        logprobs=tuple(chain.from_iterable(event.logprobs for event in events)),
        prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
    )
