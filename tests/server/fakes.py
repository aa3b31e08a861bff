"""An engine that answers by a script, in the caller's own event loop: the server's tests need no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hrwkv.engine.core import Histogram
from hrwkv.engine.request import (
    CapacityError,
    EngineError,
    Event,
    Grammar,
    GrammarError,
    QueueFullError,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from hrwkv.server.app import create_app, make_service
from hrwkv.server.run import Server, listen
from hrwkv.server.service import Service
from hrwkv.settings import ServeSettings

CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NAME, WRONG = "fake", "("


def byte_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*letters, "<end>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", chat_template=template, clean_up_tokenization_spaces=False
    )


@dataclass
class FakeRequest:
    """One request. events: what it will say; gate: waited for before the event ``waits_at``."""

    prompt: list[int]
    params: SamplingParams
    events: list[Event]
    options: dict[str, Any]
    gate: asyncio.Event
    is_cancelled: bool = False
    failure: Exception | None = None
    fail_at: int = 0
    waits_at: int = 1

    def cancel(self) -> None:
        self.is_cancelled = True
        self.gate.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        for number, event in enumerate(self.events):
            if number >= self.waits_at:
                await self.gate.wait()
            if self.failure is not None and number == self.fail_at:
                raise self.failure
            yield event


@dataclass
class FakeEngine:
    """script: prompt text and parameters -> the texts of the choices' pieces, each list one choice."""

    script: Callable[[str, SamplingParams], Sequence[Sequence[str]]]
    tokenizer: PreTrainedTokenizerFast = field(default_factory=byte_tokenizer)
    max_context: int = 200
    queue: int = 1000
    requests: list[FakeRequest] = field(default_factory=list)
    is_alive: bool = True
    is_held: bool = False
    finish: str = "stop"
    failure: Exception | None = None
    fail_at: int = 0
    waits_at: int = 1
    stops: tuple[str, ...] = ()

    @property
    def model_config(self) -> Any:
        return SimpleNamespace(vocab_size=257)

    def submit(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> FakeRequest:
        if not self.is_alive:
            raise EngineError("the engine has stopped")
        if len(self.requests) >= self.queue:
            raise QueueFullError(f"{self.queue} requests wait")
        if len(prompt) >= self.max_context:
            raise CapacityError(f"the prompt has {len(prompt)} tokens, expected less than {self.max_context}")
        choices = self.script(self.tokenizer.decode(prompt), params)
        gate = asyncio.Event()
        if not self.is_held:
            gate.set()
        events = list(self._events(list(prompt), params, choices))
        request = FakeRequest(list(prompt), params, events, options, gate)
        request.failure, request.fail_at, request.waits_at = self.failure, self.fail_at, self.waits_at
        self.requests.append(request)
        return request

    def _events(self, prompt: list[int], params: SamplingParams, choices: Sequence[Sequence[str]]) -> Any:
        usage = Usage(len(prompt), 0, 2)
        for index, pieces in enumerate(choices):
            for number, text in enumerate(pieces):
                tokens = tuple(self.tokenizer(text[:1000])["input_ids"])
                usage = replace(usage, completion_tokens=usage.completion_tokens + len(tokens))
                is_last = number == len(pieces) - 1
                stop = next((stop for stop in params.stop if stop in self.stops), None) if is_last else None
                first = number == 0 and params.prompt_logprobs is not None
                yield Event(
                    index,
                    text,
                    tokens,
                    usage,
                    logprobs=() if params.logprobs is None else tuple(map(score, tokens)),
                    prompt_logprobs=tuple(map(score, prompt)) if first else None,
                    finish_reason=self.finish if is_last else None,
                    stop_reason=stop,
                )

    def check_grammar(self, grammar: Grammar) -> None:
        if grammar.text == WRONG:
            raise GrammarError("the form is wrong")

    def stats(self) -> Any:
        names = "queued running prompt_tokens generated_tokens preempted kv_blocks_used kv_blocks_total"
        more = "state_slots_used state_slots_total state_bytes kv_bytes prefix_bytes prompt_tokens_reused"
        first, inter = Histogram(), Histogram()
        first.add(0.2)
        for seconds in (0.01, 0.03):
            inter.add(seconds)
        counts = dict.fromkeys(f"{names} {more}".split(), 3)
        return SimpleNamespace(**counts, first_token=first, inter_token=inter)


def score(token: int) -> TokenLogprob:
    """A made-up log-probability, -token / 100, below a rival's."""
    return TokenLogprob(token, -token / 100, ((5, -0.001), (token, -token / 100)))


def fake_service(engine: FakeEngine, **settings: Any) -> Service:
    values = ServeSettings(**settings)
    return make_service(engine, values, name=NAME, defaults=GenerationConfig())  # type: ignore[arg-type]


def fake_app(engine: FakeEngine, *, api_keys: Sequence[str] = (), **settings: Any) -> Any:
    return create_app(fake_service(engine, **settings), api_keys=api_keys)


def ask(
    app: Any, path: str, body: Any = None, *, headers: dict[str, str] | None = None, method: str = ""
) -> httpx2.Response:
    """One request without a socket; a body that is not bytes is sent as JSON, NaN and half characters too."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    method = method or ("GET" if content is None else "POST")
    kind = {} if content is None else {"Content-Type": "application/json"}

    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, content=content, headers=kind | (headers or {}))

    return asyncio.run(send())


def events(response: httpx2.Response) -> list[Any]:
    """The JSON of a stream's events; its end is checked."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@asynccontextmanager
async def serving(service: Service, *, api_keys: Sequence[str] = ()) -> AsyncIterator[tuple[Server, str]]:
    """uvicorn on a free port in this event loop, and its address."""
    server = Server(service, api_keys=api_keys)
    with listen(service.settings) as listener:
        running = asyncio.ensure_future(server.serve(sockets=[listener]))
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await running
