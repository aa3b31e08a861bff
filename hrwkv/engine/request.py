"""What goes into the engine and what comes out: sampling parameters, events, and the ways a request can fail.

Plain data, checked whole when it is built, so that nothing that a client sends can fail inside a step. The
engine turns one request with ``n`` choices into n sequences; a caller sees events with an ``index``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
# Stop texts: a client's, the model's own, and the tag that closes its reasoning.
MAX_LOGPROBS, MAX_CHOICES, MAX_STOPS = 20, 128, 64


class EngineError(RuntimeError):
    """The engine failed or is closed; every waiting request gets this (HTTP 503)."""


class QueueFullError(EngineError):
    """The waiting line is full: come again later (HTTP 429)."""


class CapacityError(ValueError):
    """A request that no empty engine could hold: too long for the model or the cache (HTTP 400)."""


class GrammarError(ValueError):
    """A grammar that is wrong, or became too complex while a text followed it (HTTP 400)."""


@dataclass(frozen=True)
class Grammar:
    """What the text must match: a JSON schema, a regular expression, or a Lark grammar, as text."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when they end. Raises ValueError, naming the field.

    The order is vLLM's: logit bias, banned end tokens before ``min_tokens``, grammar, penalties, temperature,
    min_p, top_k, top_p, draw. Log-probabilities are those of the raw logits, before all of it.
    """

    max_tokens: int | None = None
    """New tokens at most; None: as many as the model's longest context leaves."""
    min_tokens: int = 0
    """New tokens before an end-of-sequence token, a stop token or a stop string may end the text."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of likely tokens with this probability (arXiv 1904.09751); 1 is off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the likeliest (arXiv 2407.01082)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that has been generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the token has been generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and output (arXiv 1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """The draws depend on it alone, whatever else is in the batch; None: a fresh one for the request."""
    n: int = 1
    """Independent answers to one prompt, which is read once."""
    logprobs: int | None = None
    """Most likely alternatives to report beside each token's own log-probability; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, of which the first has none."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer and are not part of it."""
    include_stop: bool = False
    """Keep the stop text or token in the answer."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    grammar: Grammar | None = None
    """What the answer must match."""

    def __post_init__(self) -> None:
        """Check every field that needs no model."""
        _check_counts(self)
        _check_numbers(self)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise ValueError(f"stop is {list(self.stop)!r}, expected at most {MAX_STOPS} texts, none empty")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))


def _check_counts(params: SamplingParams) -> None:
    """Whole numbers and their ranges."""
    ranges: dict[str, tuple[int, int | None]] = {
        "max_tokens": (1, None),
        "min_tokens": (0, None),
        "top_k": (0, None),
        "n": (1, MAX_CHOICES),
        "logprobs": (0, MAX_LOGPROBS),
        "prompt_logprobs": (0, MAX_LOGPROBS),
        "seed": (-(2**63), 2**63 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(params, name)
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            expected = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} is {value!r}, expected a whole number, {expected}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(
            f"min_tokens is {params.min_tokens}, expected at most max_tokens {params.max_tokens}"
        )


def _check_numbers(params: SamplingParams) -> None:
    """Real numbers and their ranges."""
    ranges = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
        "repetition_penalty": (0.01, 100.0),  # less would make logits infinite
    }
    for name, (low, high) in ranges.items():
        value = getattr(params, name)
        excluded = name == "top_p" and value == 0
        if not math.isfinite(value) or not low <= value <= high or excluded:
            expected = f"more than {low} and at most {high}" if name == "top_p" else f"{low} to {high}"
            raise ValueError(f"{name} is {value!r}, expected a number, {expected}")
    for token, bias in params.logit_bias.items():
        if not math.isfinite(bias) or abs(bias) > 100:
            raise ValueError(f"logit_bias of token {token} is {bias!r}, expected a number, -100 to 100")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability and its rivals', most likely first; ``logprob`` is None for a first token."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of a request so far: prompt, and generated over all its choices.

    cached_tokens: of the prompt, those that an earlier request has left, so that they were not read again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Event:
    """One piece of an answer.

    text: whole characters that no stop text can take back; may be empty. tokens: the ids behind it, in the
    order of ``logprobs``, if those were asked for. finish_reason: set in the last event of each index.
    stop_reason: the stop text or token id that ended it; None for the end of sequence and for lengths.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
