"""POST /v1/chat/completions: a conversation, with reasoning and tool calls told apart from the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hrwkv.engine.request import Event, SamplingParams
from hrwkv.server import reasoning
from hrwkv.server.errors import RESPONSES, ApiError
from hrwkv.server.logprobs import Logprobs
from hrwkv.server.params import chat_params
from hrwkv.server.parse import CALL_TAGS, ReasoningSplitter, ToolCallPart, ToolParser
from hrwkv.server.schemas import ChatRequest
from hrwkv.server.service import Answer, Service, logger, started
from hrwkv.server.stream import Piece, Reply
from hrwkv.server.template import Rendered, call_grammar, chosen_tools, template_variables


def routes(service: Service, logprobs: Logprobs) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"], responses=RESPONSES)

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        service.check_choices(1, body.n)
        params = chat_params(body, service.defaults, vocab_size=service.vocab_size)
        answer, reading = await _submit(body, service, params)
        pieces = _pieces(answer, reading, logprobs if body.logprobs else None)
        reply = Reply(
            service,
            "chatcmpl",
            "chat.completion.chunk",
            "chat.completion",
            pieces,
            fold,
            [answer],
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await reply.respond(request, stream=body.stream, include_usage=usage)

    return router


@dataclass(frozen=True)
class Reading:
    """How an answer's text is taken apart. in_call: the prompt opened a tool call."""

    prompt: Rendered
    has_tools: bool
    in_call: bool
    max_calls: int | None


async def _submit(body: ChatRequest, service: Service, params: SamplingParams) -> tuple[Answer, Reading]:
    """Into the engine, in one request or in two. Raises ApiError 400 and what ``Service.submit`` raises."""
    tools = chosen_tools(body, service.chat)
    variables = template_variables(body)
    rendered = await service.in_thread(
        lambda: service.chat.render(body.messages, tools=tools, variables=variables)
    )
    # No reasoning at all is what such a model does anyway.
    if body.reasoning_budget and service.chat.reasoning_tags is None:
        message = "reasoning_budget is given, but the model's chat template has no reasoning: leave it out"
        raise ApiError(400, message, param="reasoning_budget")
    if service.settings.log_prompts:
        logger.info("prompt: %r", rendered.text)
    forced = call_grammar(body) if tools else None
    if forced is not None and params.grammar is not None:
        message = "tool_choice demands a call, and the answer is to have another form: leave one out"
        raise ApiError(400, message, param="tool_choice")
    params = replace(params, grammar=forced or params.grammar)
    prefix = f"{CALL_TAGS[0]}\n" if forced else ""
    priority = service.priority(body.priority)
    rendered, has_two_parts = _with_reasoning(body, rendered, params)
    reading = Reading(
        rendered,
        has_tools=bool(tools),
        in_call=bool(forced),
        max_calls=None if body.parallel_tool_calls else 1,
    )
    if has_two_parts:
        plan = reasoning.Plan(rendered, params, body.reasoning_budget, prefix, priority)
        return await reasoning.submit(service, plan), reading
    tokens = await service.encode(rendered.text + prefix, special=False, param="messages")
    if not tokens:
        raise ApiError(400, "the conversation has no tokens: give a message", param="messages")
    return await service.submit(tokens, params, priority=priority, param="messages"), reading


def _with_reasoning(body: ChatRequest, rendered: Rendered, params: SamplingParams) -> tuple[Rendered, bool]:
    """The prompt, and True if its reasoning has a budget, or an answer with a form after it: it is opened."""
    if rendered.tags is None or (body.reasoning_budget is None and params.grammar is None):
        return rendered, False
    if body.reasoning_budget == 0:
        return rendered.close(), False
    if body.n != 1:
        message = f"n is {body.n}, expected 1 where reasoning has a budget or its answer a form"
        raise ApiError(400, message, param="n")
    return rendered.open(), True


async def _pieces(answer: Answer, reading: Reading, logprobs: Logprobs | None) -> AsyncIterator[Piece]:
    """The chunks' choices: first the role, then the text's parts as they come, at last why it ended."""
    choices: dict[int, Choice] = {}
    async for event in started(answer):
        if event.index not in choices:
            choices[event.index] = Choice(reading)
            yield Piece(_choice(event.index, {"role": "assistant", "content": ""}), 0, event.usage)
        choice = choices[event.index]
        delta = choice.read(event)
        scores = _scores(logprobs.chat(event.logprobs)) if logprobs and event.logprobs else None
        if delta or scores:
            yield Piece(_choice(event.index, delta, logprobs=scores), 0, event.usage)
        if event.finish_reason:
            finish = (
                "tool_calls" if choice.num_calls and event.finish_reason == "stop" else event.finish_reason
            )
            last = _choice(event.index, {}, finish_reason=finish, stop_reason=event.stop_reason)
            yield Piece(last, 0, event.usage)


def _scores(content: list[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's form, whose clients may count on the field that a refusal would be in."""
    return {"content": content, "refusal": None}


def _choice(
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


class Choice:
    """One choice's text on its way through both parsers."""

    def __init__(self, reading: Reading) -> None:
        self._splitter = ReasoningSplitter(reading.prompt.tags, inside=reading.prompt.opened)
        self._tools = (
            ToolParser(inside=reading.in_call, limit=reading.max_calls) if reading.has_tools else None
        )
        self.num_calls = 0

    def read(self, event: Event) -> dict[str, Any]:
        """The delta that an event makes, possibly empty."""
        last = event.finish_reason is not None
        thought, content = self._splitter.add(event.text, last=last)
        calls: list[ToolCallPart] = []
        if self._tools is not None:
            content, calls = self._tools.add(content, last=last)
        delta: dict[str, Any] = {}
        if thought:
            delta["reasoning_content"] = thought
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = [self._call(call) for call in calls]
        return delta

    def _call(self, call: ToolCallPart) -> dict[str, Any]:
        self.num_calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": self.num_calls - 1, "id": call.id, "type": "function", "function": function}


def fold(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a whole answer from those of its chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        empty = {"role": "assistant", "content": "", "refusal": None}
        whole = choices.setdefault(
            piece["index"], {"index": piece["index"], "message": empty, "logprobs": None}
        )
        message, delta = whole["message"], piece["delta"]
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            own = {name: value for name, value in call.items() if name != "index"}
            message.setdefault("tool_calls", []).append(own)
        if piece["logprobs"] is not None:
            so_far = whole["logprobs"] or _scores([])
            whole["logprobs"] = _scores(so_far["content"] + piece["logprobs"]["content"])
        whole["finish_reason"], whole["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    for whole in choices.values():
        # OpenAI's null beside a call that nothing was said with.
        if "tool_calls" in whole["message"] and not whole["message"]["content"]:
            whole["message"]["content"] = None
    return [choices[index] for index in sorted(choices)]
