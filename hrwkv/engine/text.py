"""The text of one sequence as it grows, and what ends it: an end token, a stop token or a stop text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from hrwkv.engine.request import SamplingParams
from hrwkv.model.text import Detokenizer, StopTexts


class TextStream:
    """Text of a sequence's new tokens in pieces that no later token can change or take back.

    is_stopped: an end token, stop token or stop text came; nothing more may be added. stop_reason: the stop
    text or stop token id; None for an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        *,
        params: SamplingParams,
        end_ids: Collection[int],
    ) -> None:
        """end_ids: the model's end-of-sequence tokens, which ``params.ignore_eos`` lets pass."""
        self.is_stopped = False
        self.stop_reason: str | int | None = None
        self._params = params
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopTexts(params.stop)
        self._count = 0

    def add(self, token: int) -> str:
        """The text that this token completes, possibly nothing."""
        assert not self.is_stopped, "a token after the end"
        self._count += 1
        if self._count > self._params.min_tokens and self._ends(token):
            self.is_stopped = True
            return self._last(self._detokenizer.add(token) if self._params.include_stop else "")
        return self._advance(self._detokenizer.add(token))

    def finish(self) -> str:
        """What was held back, at an end for another reason; may still find a stop text in it."""
        return "" if self.is_stopped else self._last("")

    def _ends(self, token: int) -> bool:
        """True for an end or stop token; remembers a stop token as the reason."""
        if token in self._params.stop_token_ids:
            self.stop_reason = token
            return True
        return token in self._end_ids

    def _advance(self, text: str) -> str:
        """Text past the stop texts."""
        active, include = self._count > self._params.min_tokens, self._params.include_stop
        shown = self._stops.add(text, active=active, include=include)
        if self._stops.found is not None:
            self.is_stopped, self.stop_reason = True, self._stops.found
        return shown

    def _last(self, text: str) -> str:
        """The end: this text, bytes that stayed incomplete, and what may have begun a stop text."""
        return self._advance(text + self._detokenizer.rest()) + self._stops.rest()
