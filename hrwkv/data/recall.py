"""Recall tasks whose answers stand in the prompt, as token ids with the places of the answers.

A model is scored on them by one forward of the whole sample (teacher-forced): the log-probability of answer
tokens moves smoothly where an exact match jumps. Three kinds, which fail in different ways: ``passkey``, one
sentence in much text; ``lookup``, one of many alike pairs (Liu et al., arXiv 2307.03172); ``associative``,
many pairs of single tokens and a query for each (MQAR, arXiv 2312.04927). Left out: words and names, chat
templates, answers that must be put together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hrwkv.data.passkey import KEY_DIGITS, PasskeyTask, leading_special_ids, random_key

MAX_LOOKUPS = 4


@dataclass(frozen=True)
class RecallSample:
    """One sequence of token ids, and the places in it (each >= 1) that hold tokens of answers."""

    token_ids: list[int]
    places: list[int]


class RecallTasks:
    """Samples of all kinds for one Hugging Face tokenizer and one text.

    text: [n] int32 token ids, of which filler and associative pairs are drawn. Raises ValueError for a text
    with fewer than two different tokens.
    """

    def __init__(self, tokenizer: Any, text: npt.NDArray[np.int32]) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._passkey = PasskeyTask(tokenizer)
        self._start = leading_special_ids(tokenizer)
        special = set(tokenizer.all_special_ids)
        self._vocabulary = [token for token in np.unique(text).tolist() if token not in special]
        if len(self._vocabulary) < 2:
            raise ValueError(f"the text has {len(self._vocabulary)} different tokens: give more text")
        self.kinds: dict[str, Callable[[int, random.Random], RecallSample]] = {
            "passkey": self.passkey,
            "lookup": self.lookup,
            "associative": self.associative,
        }

    def samples(self, kind: str, *, lengths: Sequence[int], count: int, seed: int) -> list[RecallSample]:
        """``count`` samples of each length; the same seed gives the same samples.

        Raises ValueError where a length leaves no room for question and answer.
        """
        generator = random.Random(f"{seed} {kind}")
        return [self.kinds[kind](length, generator) for length in lengths for _ in range(count)]

    def passkey(self, length: int, generator: random.Random) -> RecallSample:
        """Filler with a five-digit key at a random depth, and the question for it; ``length`` tokens."""
        key = random_key(generator)
        _, answer = self._passkey.question_and_answer_ids(key)
        prompt, answer = self._passkey.make(
            self._text,
            length=length - len(answer),
            depth=generator.random(),
            key=key,
            generator=generator,
        )
        return RecallSample([*prompt, *answer], list(range(len(prompt), length)))

    def lookup(self, length: int, generator: random.Random) -> RecallSample:
        """Lines ``12345: 67890`` up to ``length`` tokens, and the last up to four of them asked again."""
        lines: list[tuple[list[int], int]] = []
        used = len(self._start)
        for number in generator.sample(range(10**KEY_DIGITS), max(length // 4, 1)):
            line = self._line(f"{number:0{KEY_DIGITS}d}", random_key(generator))
            # The first few are asked for at the end, so each of them takes its place twice.
            used += len(line[0]) * (2 if len(lines) < MAX_LOOKUPS else 1)
            if used > length:
                break
            lines.append(line)
        if not lines:
            raise ValueError(f"a lookup sample of {length} tokens is too short for a pair and its question")
        asked = generator.sample(lines[:MAX_LOOKUPS], min(MAX_LOOKUPS, len(lines)))
        generator.shuffle(lines)
        token_ids = [*self._start, *chain.from_iterable(ids for ids, _ in lines)]
        places: list[int] = []
        for ids, shared in asked:
            places += range(len(token_ids) + shared, len(token_ids) + len(ids))
            token_ids += ids
        return RecallSample(token_ids, places)

    def associative(self, length: int, generator: random.Random) -> RecallSample:
        """Pairs of single tokens, then every key again, in another order, with its value."""
        count = min((length - len(self._start)) // 4, len(self._vocabulary) // 2)
        if count < 1:
            raise ValueError(f"an associative sample of {length} tokens is too short for a pair and a query")
        keys = generator.sample(self._vocabulary, count)
        pairs = [[key, generator.choice(self._vocabulary)] for key in keys]
        queries = generator.sample(pairs, count)
        token_ids = [*self._start, *chain.from_iterable(pairs + queries)]
        first = len(self._start) + 2 * count
        return RecallSample(token_ids, list(range(first + 1, first + 2 * count, 2)))

    def _line(self, key: str, value: str) -> tuple[list[int], int]:
        """A pair as ids, and how many of them say nothing about the value, however it is tokenised."""
        whole, open_end = self._encode(f"\n{key}: {value}"), self._encode(f"\n{key}: ")
        shared = 0
        while shared < min(len(whole), len(open_end)) and whole[shared] == open_end[shared]:
            shared += 1
        return whole, shared

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
