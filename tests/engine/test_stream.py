from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from hrwkv.engine.request import EngineError, Event, TokenLogprob, Usage
from hrwkv.engine.stream import Request, join


def event(index: int, text: str, *, ends: bool = False) -> Event:
    tokens = tuple(text.encode())
    return Event(
        index,
        text,
        tokens,
        Usage(3, len(text)),
        logprobs=tuple(TokenLogprob(token, -1.0) for token in tokens),
        finish_reason="stop" if ends else None,
    )


def make(num_choices: int = 1) -> Request:
    return Request(7, num_choices, cancel=lambda number: None)


def test_unread_events_of_a_choice_are_joined_and_choices_keep_their_order() -> None:
    request = make(2)
    for each in (event(1, "a"), event(0, "b"), event(1, "c", ends=True), event(0, "d", ends=True)):
        request.put(each)
    assert list(request) == [
        join([event(1, "a"), event(1, "c", ends=True)]),
        join([event(0, "b"), event(0, "d", ends=True)]),
    ]
    assert join([event(1, "a"), event(1, "c", ends=True)]).text == "ac"


def test_an_error_comes_after_what_was_written() -> None:
    request = make()
    request.put(event(0, "a"))
    request.fail(EngineError("broken"))
    events = iter(request)
    assert next(events).text == "a"
    with pytest.raises(EngineError, match="broken"):
        next(events)


@pytest.mark.parametrize("fails", [False, True])
def test_a_waiting_reader_is_woken_from_another_thread(fails: bool) -> None:
    async def read(request: Request) -> str:
        return "".join([each.text async for each in request])

    async def run() -> str:
        request = make()
        reader = asyncio.create_task(read(request))
        await asyncio.sleep(0)
        for text in ("a", "b", "c"):
            await asyncio.to_thread(request.put, event(0, text))
        last = (request.fail, EngineError("broken")) if fails else (request.put, event(0, "d", ends=True))
        threading.Thread(target=last[0], args=last[1:]).start()  # type: ignore[arg-type]
        return await asyncio.wait_for(reader, 60)

    if fails:
        with pytest.raises(EngineError, match="broken"):
            asyncio.run(run())
    else:
        assert asyncio.run(run()) == "abcd"


def test_events_are_joined_by_who_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new event was joined to all before it: 32,000 unread tokens took 4 s of the engine's thread."""
    joined: list[int] = []

    def count(events: Sequence[Event]) -> Event:
        joined.append(len(events))
        return join(events)

    monkeypatch.setattr("hrwkv.engine.stream.join", count)
    request = make()
    for number in range(1000):
        request.put(event(0, "a", ends=number == 999))
    assert joined == []
    (only,) = request
    assert joined == [1000]
    assert (only.text, len(only.tokens), only.finish_reason) == ("a" * 1000, 1000, "stop")


def test_cancel_names_the_request() -> None:
    cancelled: list[int] = []
    Request(7, 1, cancel=cancelled.append).cancel()
    assert cancelled == [7]
