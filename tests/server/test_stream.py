"""Over real sockets: clients that leave, read slowly or say nothing, and an engine that fails."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from hrwkv.engine.request import EngineError
from hrwkv.server import stream
from hrwkv.server.stream import to_json
from tests.server.fakes import FakeEngine, ask, fake_app, fake_service, serving

BODY = {"prompt": "a", "stream": True}


def endless(pieces: int = 3, size: int = 1, **options: Any) -> FakeEngine:
    return FakeEngine(lambda prompt, params: [["x" * size] * pieces], **options)


async def until(condition: Callable[[], bool]) -> None:
    """Ends when the condition holds; the test's own timeout is the end of patience."""
    while not condition():
        await asyncio.sleep(0.005)


async def post_raw(url: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a bare socket, to be left or read as a test likes."""
    content, port = json.dumps(body).encode(), int(url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


def run(engine: FakeEngine, test: Callable[[str], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with serving(fake_service(engine, port=0, **settings)) as (_, url):
            await test(url)

    asyncio.run(main())


async def complete(url: str) -> str:
    """The text that another client gets, which shows that the others go on."""
    async with httpx2.AsyncClient() as client:
        response = await client.post(f"{url}/v1/completions", json={"prompt": "a"})
    return str(response.json()["choices"][0]["text"])


def test_a_client_that_leaves_its_stream_is_cancelled() -> None:
    engine = endless(is_held=True)

    async def test(url: str) -> None:
        reader, writer = await post_raw(url, BODY)
        await reader.readuntil(b'"text":"x"')
        # As if killed: no farewell, the kernel resets the connection.
        writer.transport.abort()
        await until(lambda: engine.requests[0].is_cancelled)
        engine.is_held = False
        assert await complete(url) == "xxx"

    run(engine, test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_is_cancelled(stream: bool) -> None:
    engine = endless(is_held=True, waits_at=0)

    async def test(url: str) -> None:
        _, writer = await post_raw(url, BODY | {"stream": stream})
        await until(lambda: bool(engine.requests))
        writer.transport.abort()
        await until(lambda: engine.requests[0].is_cancelled)

    run(engine, test)


def test_a_slow_reader_stops_nobody() -> None:
    """It reads nothing of 20 MB; the others have their answers meanwhile, and it has all of it in the end."""
    engine = endless(pieces=20, size=1_000_000)

    async def test(url: str) -> None:
        reader, writer = await post_raw(url, BODY)
        await until(lambda: bool(engine.requests))
        engine.script = lambda prompt, params: [["quick"]]
        assert await asyncio.gather(*(complete(url) for _ in range(5))) == ["quick"] * 5
        read = bytearray()
        while not read.endswith(b"0\r\n\r\n"):
            read += await reader.read(2**20)
        assert read.count(b"x") >= 20_000_000
        writer.close()

    run(engine, test)


def test_a_reader_that_never_reads_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "READER_SECONDS", 0.0)
    engine = endless(pieces=20, size=1_000_000)
    caplog.set_level(logging.WARNING)

    async def test(url: str) -> None:
        _, writer = await post_raw(url, BODY)
        await until(lambda: bool(engine.requests) and engine.requests[0].is_cancelled)
        writer.transport.abort()

    run(engine, test, request_seconds=0.1)
    assert "cut off a reader" in caplog.text


def test_connections_that_say_nothing_stop_nobody() -> None:
    async def test(url: str) -> None:
        port = int(url.rsplit(":", 1)[1])
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        half = await asyncio.open_connection("127.0.0.1", port)
        half[1].write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert await complete(url) == "xxx"
        for _, writer in (*idle, half):
            writer.close()

    run(endless(), test)


def test_an_engine_that_dies_fails_who_waits_at_once() -> None:
    engine = endless(is_held=True, waits_at=0, failure=EngineError("the engine stopped: no memory"))

    async def test(url: str) -> None:
        async with httpx2.AsyncClient(base_url=url) as client:
            waiting = [
                asyncio.ensure_future(client.post("/v1/completions", json=BODY | {"stream": stream}))
                for stream in (False, True)
            ]
            await until(lambda: len(engine.requests) == 2)
            engine.is_alive = False
            for request in engine.requests:
                request.gate.set()
            for response in await asyncio.gather(*waiting):
                assert response.status_code == 503
                assert response.json()["error"]["message"] == "the engine stopped: no memory"
            assert (await client.get("/ready")).status_code == 503

    run(engine, test)


def test_a_fault_of_ours_is_500_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = endless(failure=RuntimeError("a bug with the prompt in it"))

    async def test(url: str) -> None:
        async with httpx2.AsyncClient(base_url=url) as client:
            response = await client.post("/v1/completions", json={"prompt": "a"})
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
            assert "a bug" not in response.text
            engine.failure = None
            assert await complete(url) == "xxx"

    run(engine, test)
    assert "a bug with the prompt in it" in caplog.text


def test_what_runs_is_finished_before_the_end() -> None:
    engine = endless(is_held=True)

    async def main() -> None:
        async with serving(fake_service(engine, port=0)) as (server, url):
            reader, _ = await post_raw(url, BODY)
            await reader.readuntil(b'"text":"x"')
            server.handle_exit(15, None)
            engine.requests[0].gate.set()
            rest = await reader.read()
            assert rest.count(b'"text":"x"') == 2
            assert b"[DONE]" in rest

    asyncio.run(main())


def test_what_does_not_finish_is_cut_off_at_the_end_and_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """It just broke off, which some clients take for the end; uvicorn called it an error of ours."""
    engine = endless(is_held=True)

    async def main() -> None:
        async with serving(fake_service(engine, port=0, shutdown_seconds=0.0)) as (server, url):
            reader, _ = await post_raw(url, BODY)
            await reader.readuntil(b'"text":"x"')
            server.handle_exit(15, None)
            rest = await reader.read()
            last, end, after = rest.split(b"data: ")[-2:] + [rest[-5:]]
            assert json.loads(last)["error"]["code"] == "not_ready"
            assert (end[:6], after) == (b"[DONE]", b"0\r\n\r\n")

    asyncio.run(main())
    assert engine.requests[0].is_cancelled
    assert "without completing response" not in caplog.text


def test_who_is_cut_off_before_the_first_byte_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """It was 500 in plain text, and every answer that was cut off left a traceback in the log."""
    engine = endless(is_held=True)

    async def main() -> None:
        async with serving(fake_service(engine, port=0, shutdown_seconds=0.0)) as (server, url):
            reader, _ = await post_raw(url, BODY | {"stream": False})
            await until(lambda: bool(engine.requests))
            server.handle_exit(15, None)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"code": "not_ready"' in answer

    asyncio.run(main())
    assert engine.requests[0].is_cancelled
    assert "Traceback" not in caplog.text


def test_half_characters_are_written_as_their_escapes() -> None:
    value = {"text": "h\u00e9 \ud800 \U0001f600"}
    assert json.loads(to_json(value)) == value
    assert to_json("\u00e9") == b'"\xc3\xa9"'


def test_the_log_has_the_time_of_a_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was counted from the whole second before, so that each request seemed to take up to 1 s longer."""
    clock = SimpleNamespace(time=lambda: 100.9, monotonic=iter([5.0, 5.25]).__next__)
    monkeypatch.setattr("hrwkv.server.stream.time", clock)
    caplog.set_level(logging.INFO)
    app = fake_app(FakeEngine(lambda prompt, params: [["a"]]))
    assert ask(app, "/v1/completions", {"prompt": "a"}).status_code == 200
    assert "1 + 1 tokens in 0.25 s" in caplog.text
