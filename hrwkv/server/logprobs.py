"""Log-probabilities in the two forms that OpenAI has: of completions, which lm-eval reads, and of chats."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hrwkv.engine.request import TokenLogprob

# JSON has no infinity; OpenAI writes this for a token that cannot be.
IMPOSSIBLE = -9999.0
CACHED_TEXTS = 2**16
# How vocabularies spell a byte: those with byte fallback, and those on the level of bytes.
BYTE = re.compile("<0x([0-9A-F]{2})>")
LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Logprobs:
    """Both forms for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
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
        return {"token": text, "logprob": _number(logprob), "bytes": self._bytes(token, text)}

    def _bytes(self, token: int, text: str) -> list[int] | None:
        """Those of the text, or of the part of a character that the token is; None if they are unknown."""
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return list(text.encode())
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := BYTE.fullmatch(piece):
            return [int(found[1], 16)]
        return [LETTERS[letter] for letter in piece] if LETTERS.keys() >= set(piece) else None


def _number(value: float | None) -> float | None:
    if value is None or math.isfinite(value):
        return value
    return IMPOSSIBLE
