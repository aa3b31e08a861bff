"""Who comes in, how much a body may be, one form of every refusal; poisoned bodies end in no 500."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from hrwkv.server.app import create_app
from hrwkv.server.service import Service
from tests.server.fakes import FakeEngine, ask, fake_app, fake_service, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEYS = ["secret-1", "secret-2"]


def engine() -> FakeEngine:
    return FakeEngine(lambda prompt, params: [["a"]] * params.n)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/tokenizer_info", "/x"]
)
def test_keys_guard_everything(path: str) -> None:
    app = fake_app(engine(), api_keys=KEYS)
    for headers in (
        {},
        bearer("secret"),
        bearer(""),
        {"Authorization": "Basic secret-1"},
        bearer("secret-1 x"),
    ):
        response = ask(app, path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    expected = 404 if path == "/x" else 200
    assert [ask(app, path, headers=bearer(key)).status_code for key in KEYS] == [expected] * 2


def test_probes_need_no_key() -> None:
    app = fake_app(engine(), api_keys=KEYS)
    probes = [ask(app, path, method=method) for path in ("/health", "/ready") for method in ("GET", "HEAD")]
    assert [probe.status_code for probe in probes] == [200] * 4
    assert ask(app, COMPLETIONS, {"prompt": "a"}).status_code == 401


def test_a_body_has_a_limit() -> None:
    app = fake_app(engine(), max_body_bytes=100)
    room = 100 - len(json.dumps({"prompt": ""}))
    assert ask(app, COMPLETIONS, {"prompt": "a" * room}).status_code == 200
    response = ask(app, COMPLETIONS, {"prompt": "a" * (room + 1)})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "101 bytes, expected at most 100" in response.text


def test_who_sends_before_reading_is_told_too() -> None:
    """The connection was reset in the middle of the body, which says nothing of the reason."""

    async def send() -> int:
        async with serving(fake_service(engine(), port=0)) as (_, url):
            request = urllib.request.Request(url + COMPLETIONS, b"a" * 20_000_000)
            with pytest.raises(urllib.error.HTTPError, match="413") as caught:
                await asyncio.to_thread(urllib.request.urlopen, request)
            return caught.value.code

    assert asyncio.run(send()) == 413


@pytest.mark.parametrize("header", [{}, {"Expect": "100-continue"}])
def test_a_body_that_does_not_come_is_not_waited_for(
    header: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrwkv.server.access.DRAIN_SECONDS", 60.0 if header else 0.01)

    async def send() -> bytes:
        async with serving(fake_service(engine(), port=0)) as (_, url):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            fields = {"Host": "x", "Content-Length": str(2**30)} | header
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\n{head}\r\n".encode())
            line = await asyncio.wait_for(reader.readline(), 30)
            writer.close()
            return line

    assert b" 413 " in asyncio.run(send())


def test_a_body_that_does_not_tell_its_size_has_it_too() -> None:
    async def chunked(pieces: int) -> httpx2.Response:
        async def content() -> AsyncIterator[bytes]:
            for _ in range(pieces):
                yield b" " * 40

        transport = httpx2.ASGITransport(app=fake_app(engine(), max_body_bytes=100))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            kind = {"Content-Type": "application/json"}
            return await client.post(COMPLETIONS, content=content(), headers=kind)

    assert asyncio.run(chunked(2)).status_code == 422
    assert asyncio.run(chunked(3)).status_code == 413


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that sent a part and no more held it in memory for ever."""
    monkeypatch.setattr("hrwkv.server.access.BODY_SECONDS", 0.05)
    app, sent = fake_app(engine()), []
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        return next(parts, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_timeout"


def test_an_answer_may_take_longer_than_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrwkv.server.access.BODY_SECONDS", 0.05)
    slow = engine()
    slow.is_held, slow.waits_at = True, 0

    async def run() -> int:
        async with serving(fake_service(slow)) as (_, url), httpx2.AsyncClient() as client:
            asked = asyncio.ensure_future(client.post(url + COMPLETIONS, json={"prompt": "a"}))
            while not slow.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            slow.requests[0].gate.set()
            return (await asked).status_code

    assert asyncio.run(run()) == 200


def test_what_is_far_too_long_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    app, asked = fake_app(engine()), {"role": "user", "content": "a"}
    response = ask(app, CHAT, {"messages": [asked] * 4097})
    assert (response.status_code, "at most 4096 items" in response.text) == (422, True)
    monkeypatch.delattr(Service, "_encode")
    # A token of this tokenizer is one character, but for "<end>"; and a prompt may have 200.
    response = ask(app, COMPLETIONS, {"prompt": "a" * (4 * 5 * 200 + 1)})
    assert (response.status_code, "prompt has 4001 characters" in response.text) == (400, True)


@pytest.mark.parametrize(
    "fields",
    [{"a" * 10**6: 1}, {"model": "a" * 10**6}, {"stop": [str(number) * 10**5 for number in range(17)]}],
)
def test_a_refusal_is_short(fields: dict[str, Any]) -> None:
    response = ask(fake_app(engine()), COMPLETIONS, {"prompt": "a"} | fields)
    assert response.status_code in (400, 404)
    assert len(response.content) < 700


def test_other_origins_are_let_in_only_by_name() -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, expected in (((), None), (("https://a.example",), "https://a.example")):
        app = fake_app(engine(), api_keys=KEYS, cors_origins=origins)
        headers = ask(app, "/v1/models", headers=asked | bearer(KEYS[0])).headers
        assert headers.get("Access-Control-Allow-Origin") == expected


def test_a_server_that_stops_takes_nothing_new() -> None:
    service = fake_service(engine())
    app = create_app(service)
    assert ask(app, "/ready").status_code == 200
    service.draining.set()
    assert (ask(app, "/ready").status_code, ask(app, "/health").status_code) == (503, 200)
    assert ask(app, COMPLETIONS, {"prompt": "a"}).status_code == 503


def test_a_dead_engine_is_neither_ready_nor_healthy() -> None:
    dead = engine()
    dead.is_alive = False
    app = fake_app(dead)
    for path, body in (("/ready", None), ("/health", None), (COMPLETIONS, {"prompt": "a"})):
        response = ask(app, path, body)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "service_unavailable_error"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/nope", None, 404, "there is no GET /nope"),
        (COMPLETIONS, None, 405, "GET /v1/completions is not allowed"),
        ("/v1/models/x", None, 404, "there is no model 'x'"),
        (COMPLETIONS, b"{", 422, "the body is not JSON"),
        (COMPLETIONS, b"\xff\xfe", 422, "the body is not JSON"),
        (COMPLETIONS, b"", 422, "the body is no JSON object"),
        (COMPLETIONS, [], 422, "the body is no JSON object"),
        (COMPLETIONS, {}, 422, "prompt: field required"),
        (COMPLETIONS, b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}", 422, "a number too long"),
        (COMPLETIONS, b"[" * 100_000, 422, "too deeply nested"),
        (CHAT, {"messages": {}}, 422, "messages"),
    ],
)
def test_every_refusal_has_openais_form(path: str, body: Any, status: int, says: str) -> None:
    response = ask(fake_app(engine()), path, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert "\n" not in error["message"]


POISON: dict[str, Any] = {
    "null": None,
    "nan": float("nan"),
    "infinity": float("inf"),
    "text": "x",
    "half-character": "\ud800",
    "number": 3,
    "negative": -1,
    "huge": 10**300,
    "fraction": 0.5,
    "true": True,
    "list": [],
    "list-of-nulls": [None],
    "nested": [[[{}]]],
    "object": {"a": {}},
    "deep": [],
}
for _ in range(400):
    POISON["deep"] = [POISON["deep"]]
FIELDS = {
    COMPLETIONS: "prompt echo logprobs add_special_tokens guided_json structured_outputs",
    CHAT: "messages tools tool_choice top_logprobs reasoning_budget chat_template_kwargs reasoning_effort",
}
SHARED = """model max_tokens min_tokens temperature top_p top_k min_p n seed stop stop_token_ids ignore_eos
    stream presence_penalty frequency_penalty repetition_penalty logit_bias stream_options response_format
    priority"""
MESSAGE = "role content name tool_calls tool_call_id reasoning_content"


@pytest.mark.parametrize("poison", POISON)
def test_poison_in_any_field_is_refused_or_harmless(poison: str) -> None:
    app, value = fake_app(engine()), POISON[poison]
    start = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": [{"role": "user", "content": "a"}]}}
    for path, fields in FIELDS.items():
        for name in (*fields.split(), *SHARED.split()):
            response = ask(app, path, start[path] | {name: value})
            assert response.status_code in (200, 400, 404, 422), (name, response.text)
            if response.status_code != 200:
                assert response.json()["error"]["message"]
    for name in MESSAGE.split():
        message = {"role": "user", "content": "a"} | {name: value}
        response = ask(app, CHAT, {"messages": [message]})
        assert response.status_code in (200, 400, 422), (name, response.text)


def test_answers_are_counted_by_path_and_status() -> None:
    app = fake_app(engine())
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (COMPLETIONS, {}), ("/a", None), ("/b", None)):
        ask(app, path, body)
    text = ask(app, "/metrics").text
    assert 'hrwkv_http_responses_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'hrwkv_http_responses_total{path="/v1/completions",status="422"} 1.0' in text
    broken = fake_app(FakeEngine(lambda prompt, params: [["a"]], failure=RuntimeError("a bug")))
    assert ask(broken, COMPLETIONS, {"prompt": "a"}).status_code == 500
    counted = 'hrwkv_http_responses_total{path="/v1/completions",status="500"} 1.0'
    assert counted in ask(broken, "/metrics").text
    # What clients make up is one label.
    assert 'hrwkv_http_responses_total{path="other",status="404"} 2.0' in text
