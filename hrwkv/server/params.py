"""From a request's fields to the engine's SamplingParams; what does not fit is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from hrwkv.engine.request import Grammar, SamplingParams
from hrwkv.server.errors import ApiError
from hrwkv.server.schemas import ChatRequest, CompletionRequest, Sampling

# Characters. Making a mask of a larger one takes minutes.
MAX_GRAMMAR = 2**17
# Of a request; the model's own come on top.
MAX_STOPS = 16


@dataclass(frozen=True)
class Defaults:
    """What a request gets that says nothing: OpenAI's values, or those of the model's maker.

    stop ends an answer of a chat in any case; the ends that are tokens are the engine's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: GenerationConfig, *, sampling: bool) -> Defaults:
        """What ends an answer, and with ``sampling`` how the model's maker wants tokens to be chosen."""
        stop = config.stop_strings or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not sampling:
            return cls(stop=stop)
        return cls(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=config.top_p or 1.0,
            top_k=config.top_k or 0,
            repetition_penalty=config.repetition_penalty or 1.0,
            stop=stop,
        )


def completion_params(body: CompletionRequest, defaults: Defaults, *, vocab_size: int) -> SamplingParams:
    """Raises ApiError 400, naming the field, for what cannot be served.

    An echo without new tokens is a request for one token, which is left out of the answer.
    """
    maximum = 1 if body.echo and body.max_tokens == 0 else body.max_tokens
    return _params(
        body,
        defaults,
        vocab_size=vocab_size,
        max_tokens=maximum,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        spelling={"prompt_logprobs": "logprobs"},
    )


def chat_params(body: ChatRequest, defaults: Defaults, *, vocab_size: int) -> SamplingParams:
    """The same for a chat, whose answer also ends where the model's own answers do."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs true: give both", param="top_logprobs")
    is_older = body.max_completion_tokens is None
    return _params(
        body,
        defaults,
        vocab_size=vocab_size,
        max_tokens=body.max_tokens if is_older else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        own_stop=defaults.stop,
        spelling={"logprobs": "top_logprobs"} | ({} if is_older else {"max_tokens": "max_completion_tokens"}),
    )


def _params(
    body: Sampling,
    defaults: Defaults,
    *,
    vocab_size: int,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    own_stop: tuple[str, ...] = (),
    spelling: Mapping[str, str],
) -> SamplingParams:
    """spelling: fields of SamplingParams that the request calls otherwise."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream true: give both", param="stream_options")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stop) > MAX_STOPS:
        raise ApiError(400, f"stop has {len(stop)} texts, expected at most {MAX_STOPS}", param="stop")
    # -1 is how vLLM's clients spell "off"; more than all tokens is all of them.
    top_k = defaults.top_k if body.top_k is None else 0 if body.top_k == -1 else min(body.top_k, vocab_size)
    values: dict[str, Any] = {
        name: getattr(defaults if getattr(body, name) is None else body, name)
        for name in ("temperature", "top_p", "repetition_penalty")
    }
    with _naming(spelling):
        return SamplingParams(
            **values,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            top_k=top_k,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=_logit_bias(body.logit_bias, vocab_size),
            seed=body.seed,
            n=body.n,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=tuple(dict.fromkeys((*stop, *own_stop))),
            stop_token_ids=_token_ids(body.stop_token_ids, vocab_size),
            include_stop=body.include_stop_str_in_output,
            ignore_eos=body.ignore_eos,
            grammar=_grammar(body),
        )


@contextmanager
def _naming(spelling: Mapping[str, str]) -> Iterator[None]:
    """Turn a ValueError of SamplingParams, which begins with its field, into a 400 about the request's."""
    try:
        yield
    except ValueError as error:
        field, _, rest = " ".join(str(error).split()).partition(" ")
        name = spelling.get(field, field)
        raise ApiError(400, f"{name} {rest}", param=name) from error


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    """JSON's keys are texts."""
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 20 and int(token) < vocab_size):
            expected = f"a token id, 0 to {vocab_size - 1}"
            raise ApiError(400, f"logit_bias has the key {token!r}, expected {expected}", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _token_ids(given: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    for token in given:
        if not 0 <= token < vocab_size:
            expected = f"a token id, 0 to {vocab_size - 1}"
            raise ApiError(400, f"stop_token_ids has {token}, expected {expected}", param="stop_token_ids")
    return tuple(dict.fromkeys(given))


def _grammar(body: Sampling) -> Grammar | None:
    """The form that an answer must have, from whichever field asks for it; more than one is refused."""
    found = [*_response_format(body), *_structured(body)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise _about(found[1][0], f"{names} are both given, expected one of them")
    for name, grammar in found:
        if len(grammar.text) > MAX_GRAMMAR:
            message = f"{name} has {len(grammar.text)} characters, expected at most {MAX_GRAMMAR}"
            raise _about(name, message)
    return found[0][1] if found else None


def _about(name: str, message: str) -> ApiError:
    """A refusal of a field, or of one inside it: ``field.inner``."""
    return ApiError(400, message, param=name.partition(".")[0])


def _response_format(body: Sampling) -> list[tuple[str, Grammar]]:
    form = body.response_format
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [("response_format", Grammar("json_schema", '{"type": "object"}'))]
    if form.json_schema is None:
        message = "response_format has the type json_schema without a json_schema: give one"
        raise ApiError(400, message, param="response_format")
    return [("response_format", Grammar("json_schema", json.dumps(form.json_schema.json_schema)))]


def _structured(body: Sampling) -> list[tuple[str, Grammar]]:
    """vLLM's fields, the newer object and the older single ones."""
    outputs = body.structured_outputs
    given: list[tuple[str, str, Any]] = [
        ("guided_json", "json", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_grammar", "grammar", body.guided_grammar),
        ("guided_choice", "choice", body.guided_choice),
    ]
    if outputs is not None:
        whole = {"type": "object"} if outputs.json_object else None
        inner: dict[str, Any] = {"json": outputs.json_, "json_object": whole, "regex": outputs.regex}
        inner |= {"grammar": outputs.grammar, "choice": outputs.choice}
        given += [
            (f"structured_outputs.{name}", name.removesuffix("_object"), value)
            for name, value in inner.items()
        ]
    return [(name, _as_grammar(name, kind, value)) for name, kind, value in given if value is not None]


def _as_grammar(name: str, kind: str, value: Any) -> Grammar:
    if kind == "json":
        return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))
    if kind == "regex":
        return Grammar("regex", value)
    if kind == "grammar":
        return Grammar("lark", value)
    if not value or not all(value):
        raise _about(name, f"{name} has no choice or an empty one, expected texts")
    return Grammar("lark", "start: " + " | ".join(json.dumps(choice) for choice in value))
