"""The client against a server that says what the test wants, in a thread of its own."""

import io
import json
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hrwkv.cli.chat_server import ServerModel, _advice
from hrwkv.cli.generate import Piece, SamplingSettings
from tests.cli.conftest import Run

MODELS = {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]}


@dataclass
class Stub:
    """What the server answers, and what it was sent."""

    url: str = ""
    status: int = 200
    models: bytes = json.dumps(MODELS).encode()
    answer: bytes = b""
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def stub() -> Iterator[Stub]:
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.reply(200, state.models)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply(state.status, state.answer)

        def reply(self, status: int, body: bytes) -> None:
            state.keys.append(self.headers["Authorization"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def stream(*deltas: dict[str, str], tokens: int = 3, end: bytes = b"data: [DONE]\n\n") -> bytes:
    """Server-sent events as our server and OpenAI's write them."""
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta}], "usage": None} for delta in deltas
    ]
    events.append({"choices": [], "usage": {"completion_tokens": tokens}})
    return b": ping\n\n" + b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + end


def opened(
    stub: Stub, *, no_reasoning: bool = False, key: Path | None = None, **settings: Any
) -> ServerModel:
    return ServerModel.open(
        stub.url, settings=SamplingSettings(**settings), no_reasoning=no_reasoning, api_key_file=key
    )


@pytest.mark.parametrize("ending", ["", "/v1/", "/v1/chat/completions"])
def test_an_answer_is_read_as_it_streams(ending: str, stub: Stub, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("# mine\nsecret\n")
    stub.url += ending
    server = opened(stub, key=key, seed=5, top_k=4, stop=("##",), no_reasoning=True)
    stub.answer = stream(
        {"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "\u20ac"}
    )
    messages = [{"role": "user", "content": "hi"}]
    pieces = list(server.answer(messages, attempt=2))
    assert pieces == [Piece("hm", 0, is_reasoning=True), Piece("\u20ac", 0), Piece("", 3)]
    assert stub.bodies == [
        {
            "model": "tiny",
            "messages": messages,
            "max_tokens": 256,
            "seed": 7,
            "top_k": 4,
            "stop": ["##"],
            "reasoning_budget": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert stub.keys == ["Bearer secret"] * 2


def test_what_is_not_asked_for_is_left_to_the_server(stub: Stub) -> None:
    assert opened(stub).fields == {"model": "tiny", "max_tokens": 256}


def test_refusals_and_broken_answers_are_told(stub: Stub) -> None:
    server = opened(stub)
    stub.status, stub.answer = 429, b'{"error": {"message": "the line is full"}}'
    with pytest.raises(ValueError, match="refuses with 429: the line is full"):
        next(server.answer([], attempt=0))
    for error, says in (
        ('"no"', "Too Many"),
        ('{"message": "long", "code": "context_length_exceeded"}', "/reset"),
    ):
        stub.answer = b'{"error": %s}' % error.encode()
        with pytest.raises(ValueError, match=f"refuses with 429: .*{says}"):
            next(server.answer([], attempt=0))
    stub.answer = b"<html>"
    with pytest.raises(ValueError, match="refuses with 429: Too Many Requests"):
        next(server.answer([], attempt=0))
    stub.status, stub.answer = 200, stream({"content": "a"}, end=b'data: {"error": {"message": "fire"}}\n\n')
    with pytest.raises(ValueError, match="broke off: fire"):
        list(server.answer([], attempt=0))
    stub.answer = stream({"content": "a"}, end=b"")
    with pytest.raises(ValueError, match="broke off in the answer, which has no end"):
        list(server.answer([], attempt=0))
    stub.answer = b"data: {nonsense\n\n"
    with pytest.raises(ValueError, match="is no JSON"):
        list(server.answer([], attempt=0))


def test_a_server_that_wants_a_key_or_speaks_otherwise_is_told(stub: Stub) -> None:
    """Its answer says what to do in HTTP, and the library's reason nothing to a user."""
    server = opened(stub)
    stub.status, stub.answer = 401, b'{"error": {"message": "send Authorization: Bearer KEY"}}'
    with pytest.raises(ValueError, match="refuses with 401: give --api-key-file"):
        next(server.answer([], attempt=0))
    stub.url = stub.url.replace("http:", "https:")
    with pytest.raises(ValueError, match="does not answer .*: does it speak http:// only"):
        opened(stub)
    assert "SSL_CERT_FILE" in _advice(ssl.SSLCertVerificationError())
    assert "https" in _advice(RemoteDisconnected())


def test_servers_that_are_none_are_told(stub: Stub, run: Run, tmp_path: Path) -> None:
    def line(*words: object) -> str:
        done = run("chat", *words)
        assert (done.code, done.err.count("\n")) == (2, 1)
        return done.err

    assert "does not answer" in line("http://127.0.0.1:1")
    for name in ("127.0.0.1:8000", "localhost:8000/v1"):
        assert f"{name} is no directory; if it is a server, give its URL: http://{name}" in line(name)
    assert "--dtype and --device are for a directory" in line(stub.url, "--device", "cpu")
    (tmp_path / "empty").write_text("\n")
    assert "empty holds no key" in line(stub.url, "--api-key-file", tmp_path / "empty")
    stub.models = b"hello"
    assert "is no JSON" in line(stub.url)
    stub.models = b'{"data": []}'
    assert "serves no model" in line(stub.url)


def test_a_conversation_over_http(stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.answer = stream({"content": "o"}, {"content": "k"})
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    done = run("chat", stub.url, "--system", "brief", "--temperature", 0)
    assert done.code == 0
    assert done.out.split("ends.\n")[1] == "> ok\n> ok\n> "
    assert [message["content"] for message in stub.bodies[1]["messages"]] == ["brief", "one", "ok", "two"]
    assert stub.bodies[1]["temperature"] == 0
