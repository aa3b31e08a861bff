"""Text of tokens as they come: whole characters, and stop texts of which nothing is shown.

Both generation loops read through these two classes. Neither looks back further than it must, so a token
costs the same at any length of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
PROMPT_TAIL = 4
# Tokens that are decoded at once at most, and those kept when there have been more.
WINDOW, KEPT = 64, 32
# Marks that may still become characters: a tokenizer with byte fallback marks all bytes of a run that does
# not end with a character, which are up to 4 of the last one and 3 of the next.
HELD_MARKS = 7


class Detokenizer:
    """Text of one token after another; waits while a character is incomplete. Special tokens have no text.

    A token's text depends on its neighbours (leading spaces, bytes of one character), so it is what decoding
    a short tail, which begins with the end of the prompt, has more than before. A character that the prompt
    leaves incomplete is the answer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # One of these begins with a character, of at most 4 bytes, if the prompt ends with one.
        for size in range(PROMPT_TAIL, PROMPT_TAIL + 4):
            self._tokens = list(prompt[-size:])
            if INCOMPLETE not in (text := self._decode()):
                break
        self._shown = len(_complete(text))
        # Where the next tail begins: with the token behind the last text.
        self._next = len(self._tokens)

    def add(self, token: int) -> str:
        """What this token completes, possibly nothing."""
        self._tokens.append(token)
        text = self._decode()
        complete = _complete(text)
        piece = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if piece and len(complete) == len(text):
            self._tokens = self._tokens[self._next :]
            self._next, self._shown = len(self._tokens), len(self._decode())
        elif len(self._tokens) > WINDOW:
            left = len(text) - self._shown
            self._tokens = self._tokens[-KEPT:]
            self._next, self._shown = KEPT, max(0, len(self._decode()) - left)
        return piece

    def rest(self) -> str:
        """What has not been returned yet, at the end of the answer: bytes that are no character."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        text = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class StopTexts:
    """Finds the first stop text as text comes, and gives only what none of them can still take back.

    The first is the one that is complete first, of those the longest, so that the result does not depend on
    how the text is cut into pieces. One step of an automaton for each stop text and character
    (Knuth, Morris, Pratt 1977, doi:10.1137/0206024).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def add(self, text: str, *, active: bool = True, include: bool = False) -> str:
        """Text that is safe to show. Once ``found`` is set, the end of it; nothing may be added then.

        active: False lets stop texts that are complete in this text pass. include: show the one found.
        """
        assert self.found is None, "text after a stop text"
        if not any(self._matched) and not any(stop[0] in text for stop in self._stops):
            return text
        self._held += text
        start = len(self._held) - len(text)
        for end, char in enumerate(text, start=start + 1):
            if (stop := self._step(char)) is not None and active:
                shown = self._held[: end if include else end - len(stop)]
                self.found, self._held = stop, ""
                return shown
        safe = len(self._held) - max(self._matched)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def rest(self) -> str:
        """What is held back: at the end of a text it belongs to it; nothing once a stop text is found."""
        return self._held

    def _step(self, char: str) -> str | None:
        """Move every automaton; the longest stop text that this character completes."""
        complete = None
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                complete = stop if complete is None else max(complete, stop, key=len)
                matched = borders[matched - 1]
            self._matched[index] = matched
        return complete


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders, matched = [0], 0
    for char in text[1:]:
        while matched and text[matched] != char:
            matched = borders[matched - 1]
        matched += text[matched] == char
        borders.append(matched)
    return borders


def _complete(text: str) -> str:
    """Without the marks at the end that may still become characters."""
    marks = len(text) - len(text.rstrip(INCOMPLETE))
    return text[: len(text) - min(marks, HELD_MARKS)]
