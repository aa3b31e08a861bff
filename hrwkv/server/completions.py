"""POST /v1/completions: prompts as text or token ids, one or many, with echo and log-probabilities.

With ``echo`` and ``logprobs`` the lists run over the prompt's tokens and then the new ones, which is what
lm-eval's ``local-completions`` reads its scores from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hrwkv.engine.request import Event, FinishReason
from hrwkv.server.errors import RESPONSES, ApiError
from hrwkv.server.logprobs import Logprobs
from hrwkv.server.params import completion_params
from hrwkv.server.schemas import CompletionRequest
from hrwkv.server.service import Answer, Service, logger, started
from hrwkv.server.stream import Piece, Reply


def routes(service: Service, logprobs: Logprobs) -> APIRouter:
    """The one route."""
    router = APIRouter(tags=["openai"], responses=RESPONSES)

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        service.check_model(body.model)
        _check(body)
        params = completion_params(body, service.defaults, vocab_size=service.vocab_size)
        prompts = await _prompts(body, service)
        _log_prompts(service, prompts)
        priority = service.priority(body.priority)
        answers = await service.submit_all([prompt.tokens for prompt in prompts], params, priority=priority)
        reply = Reply(
            service,
            "cmpl",
            "text_completion",
            "text_completion",
            _pieces(body, prompts, answers, logprobs),
            fold,
            answers,
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await reply.respond(request, stream=body.stream, include_usage=usage)

    return router


@dataclass(frozen=True)
class Prompt:
    """One prompt; text only where it is echoed or logged."""

    tokens: list[int]
    text: str


def _check(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0 without echo: nothing would come back", param="max_tokens")
    if body.prompt == []:
        raise ApiError(400, "prompt is empty, expected a text, token ids, or a list of them", param="prompt")


async def _prompts(body: CompletionRequest, service: Service) -> list[Prompt]:
    given: Sequence[Any] = body.prompt
    single = isinstance(given, str) or isinstance(given[0], int)
    need_text = body.echo or service.settings.log_prompts
    prompts, vocab_size = [], service.vocab_size
    service.check_choices(1 if single else len(given), body.n)
    for prompt in [given] if single else given:
        if isinstance(prompt, str):
            tokens, text = await service.encode(prompt, special=body.add_special_tokens), prompt
        else:
            tokens, text = list(prompt), ""
            service.check_length(len(tokens))
            if bad := next((token for token in tokens if not 0 <= token < vocab_size), None):
                expected = f"0 to {vocab_size - 1}"
                raise ApiError(400, f"prompt has the token id {bad}, expected {expected}", param="prompt")
            if need_text:
                text = await service.decode(tokens)
        if not tokens:
            raise ApiError(400, "a prompt has no tokens: give at least one", param="prompt")
        prompts.append(Prompt(tokens, text))
    return prompts


def _log_prompts(service: Service, prompts: Sequence[Prompt]) -> None:
    if service.settings.log_prompts:
        for prompt in prompts:
            logger.info("prompt: %r", prompt.text)


async def _pieces(
    body: CompletionRequest, prompts: Sequence[Prompt], answers: Sequence[Answer], logprobs: Logprobs
) -> AsyncIterator[Piece]:
    """The choices' pieces: prompt after prompt, and of one prompt's choices as they come."""
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        offsets: dict[int, int] = {}
        async for event in started(answer):
            if body.max_tokens == 0:
                event = _without_tokens(event)
            index = number * body.n + event.index
            is_first = event.index not in offsets
            text, scored = event.text, event.logprobs
            if is_first and body.echo:
                text = prompt.text + text
                scored = (*(event.prompt_logprobs or ()), *scored)
            if not (text or scored or event.finish_reason):
                continue
            choice: dict[str, Any] = {
                "index": index,
                "text": text,
                "logprobs": None,
                "finish_reason": event.finish_reason,
                "stop_reason": event.stop_reason,
            }
            if body.logprobs is not None:
                choice["logprobs"] = logprobs.completion(scored, offset=offsets.get(event.index, 0))
            offsets[event.index] = offsets.get(event.index, 0) + len(text)
            yield Piece(choice, number, event.usage)


def _without_tokens(event: Event) -> Event:
    """An event of the one token that an echo alone had to ask for."""
    usage = replace(event.usage, completion_tokens=0)
    finish: FinishReason | None = "length" if event.finish_reason else None
    nothing = replace(event, text="", tokens=(), logprobs=(), stop_reason=None)
    return replace(nothing, usage=usage, finish_reason=finish)


def fold(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a whole answer from those of its chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        whole = choices.setdefault(piece["index"], {**piece, "text": "", "logprobs": None})
        whole["text"] += piece["text"]
        whole["finish_reason"], whole["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
        if piece["logprobs"] is not None:
            lists = whole["logprobs"] or {name: [] for name in piece["logprobs"]}
            whole["logprobs"] = {name: values + piece["logprobs"][name] for name, values in lists.items()}
    return [choices[index] for index in sorted(choices)]
