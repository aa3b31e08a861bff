"""Log-probabilities in the two forms that OpenAI has: of completions, which lm-eval reads, and of chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from hrwkv.engine.request import TokenLogprob

# JSON has no infinity; OpenAI writes this for a token that cannot be.
IMPOSSIBLE = -9999.0
CACHED_TEXTS = 2**16


class Logprobs:
    """Both forms for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = lru_cache(CACHED_TEXTS)(lambda token: str(tokenizer.decode([token])))

    def completion(self, given: Sequence[TokenLogprob], *, offset: int) -> dict[str, list[Any]]:
        """Parallel lists; ``offset`` is where the first token's text begins.

        ``top_logprobs`` has the token itself too. Tokens that look alike as text, as parts of one character
        do, share an entry, which is the most likely one's: the largest value is the largest of all tokens.
        """
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for entry in given:
            text, logprob = self._text(entry.token), _number(entry.logprob)
            top: dict[str, float | None] = {}
            for token, value in entry.top:
                top.setdefault(self._text(token), _number(value))
            top.setdefault(text, logprob)
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if logprob is None else top)
            found["text_offset"].append(offset)
            offset += len(text)
        return found

    def chat(self, given: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """A list of tokens, each with its rivals."""
        return [
            self._chat_entry(entry.token, entry.logprob)
            | {"top_logprobs": [self._chat_entry(token, value) for token, value in entry.top]}
            for entry in given
        ]

    def _chat_entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        # A part of a character has no text, so its bytes are not known here.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode()) if whole else None}


def _number(value: float | None) -> float | None:
    if value is None or math.isfinite(value):
        return value
    return IMPOSSIBLE
