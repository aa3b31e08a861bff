"""Passkey documents at token level: filler, a needle with a five-digit key, and a question for it.

Built from token ids, so that a prompt has exactly the length that is asked for. Needle, question and answer
are tokenised with their own text around them; a tokenizer that splits digits gives five answer tokens,
another one fewer (the number can depend on the key), and one that merges a space with the digits after it
gets a prompt that ends before that space. Used by the distillation mix (`PasskeyTask.documents`) and by
retrieval measurements (`PasskeyTask.make`). Left out: chat templates, several needles, other kinds of keys.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
KEY_DIGITS = 5
MAX_QUESTIONS = 3

Filler = Sequence[int] | Tensor | npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class PasskeyTemplate:
    """The task for a tokenizer whose digits are single tokens: ids with places where the key's digits go.

    needle: [n] int64, digits of the key at `needle_slots` [2, 5]; question: [q] int64 with the answer's
    digits at `question_slots` [5] and a line end after them; digits: [10] int64, the ids of 0..9.
    """

    needle: Tensor
    needle_slots: Tensor
    question: Tensor
    question_slots: Tensor
    digits: Tensor


class PasskeyTask:
    """Passkey prompts and documents for one Hugging Face tokenizer.

    shortest_document: tokens that a training document needs, whatever its key.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # What the tokenizer puts before any text (a BOS, or nothing): the model was trained with it in front.
        self._start: list[int] = leading_special_ids(tokenizer)
        self.shortest_document = self._shortest_document()

    def needle_ids(self, key: str) -> list[int]:
        """Return the token ids of the sentence that tells the key."""
        return self._encode(NEEDLE.format(key=key))

    def question_and_answer_ids(self, key: str) -> tuple[list[int], list[int]]:
        """Return the ids of the question and of the answer, split where the two tokenise apart.

        The question's ids are those that it shares with every key, so they say nothing about the answer.
        """
        question, whole = self._encode(QUESTION), self._encode(QUESTION + key)
        shared = 0
        while shared < min(len(question), len(whole)) and question[shared] == whole[shared]:
            shared += 1
        return whole[:shared], whole[shared:]

    def make(
        self,
        filler_ids: Filler,
        *,
        length: int,
        depth: float,
        key: str,
        generator: random.Random,
    ) -> tuple[list[int], list[int]]:
        """Return a prompt of exactly `length` ids and the ids of its answer.

        filler_ids: [n] token ids; a window of them is drawn with `generator` (repeated where it is too
        short). depth: where the needle lies in the filler, 0 (start) to 1 (just before the question).

        Raises ValueError when `length` leaves no room for needle and question, or depth or key are out of
        range.
        """
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"passkey depth is {depth}, expected 0 to 1")
        if len(key) != KEY_DIGITS or not (key.isascii() and key.isdigit()):
            raise ValueError(f"passkey {key!r} is not a string of {KEY_DIGITS} digits")
        needle = self.needle_ids(key)
        question, answer = self.question_and_answer_ids(key)
        room = length - len(self._start) - len(needle) - len(question)
        if room < 0:
            raise ValueError(
                f"a passkey prompt of {length} tokens is too short: needle and question take {length - room}"
            )
        filler = _window(filler_ids, room, generator)
        cut = round(depth * room)
        return [*self._start, *filler[:cut], *needle, *filler[cut:], *question], answer

    def document(self, filler_ids: Filler, *, length: int, seed: int) -> list[int]:
        """Return a training document of `length` ids: filler, a needle, one to three answered questions.

        Needle and questions lie at random places, so that training sees every distance. The same seed gives
        the same document. Raises ValueError when `length` leaves no room.
        """
        self.check_length(length)
        generator = random.Random(seed)
        key = random_key(generator)
        question, answer = self.question_and_answer_ids(key)
        asked = [*question, *answer, *self._encode("\n")]
        needle = self.needle_ids(key)
        room = length - len(self._start) - len(needle)
        count = generator.randint(1, min(MAX_QUESTIONS, room // len(asked)))
        filler = _window(filler_ids, room - count * len(asked), generator)
        cuts = sorted(generator.randint(0, len(filler)) for _ in range(count + 1))
        ids = [*self._start]
        for piece, begin, end in zip([needle, *[asked] * count], [0, *cuts], cuts, strict=False):
            ids += [*filler[begin:end], *piece]
        return ids + filler[cuts[-1] :]

    def documents(
        self, filler_ids: Filler, *, min_length: int, max_length: int, seed: int
    ) -> Iterator[list[int]]:
        """Yield training documents of `min_length` to `max_length` ids without end."""
        self.check_length(min_length)
        if max_length < min_length:
            raise ValueError(
                f"passkey documents of {min_length} to {max_length} tokens: give the shorter first"
            )
        generator = random.Random(seed)
        while True:
            length = generator.randint(min_length, max_length)
            yield self.document(filler_ids, length=length, seed=generator.getrandbits(64))

    def check_length(self, length: int) -> None:
        """Raise ValueError when a document of `length` tokens may not hold needle, question and answer."""
        if length < self.shortest_document:
            raise ValueError(
                f"passkey documents of {length} tokens are too short: give at least {self.shortest_document}"
            )

    def template(self) -> PasskeyTemplate:
        """Return the task as ids with places for digits, to build whole batches on a device.

        Raises ValueError when the tokenizer does not split digits into one token each.
        """
        digits = [self._encode(str(digit)) for digit in range(10)]
        marked = {digit: self._marked(str(digit) * KEY_DIGITS) for digit in (0, 1)}
        (needle, question), (other_needle, other_question) = marked[0], marked[1]
        needle_slots = [i for i, (x, y) in enumerate(zip(needle, other_needle, strict=False)) if x != y]
        question_slots = [i for i, (x, y) in enumerate(zip(question, other_question, strict=False)) if x != y]
        split = all(len(ids) == 1 for ids in digits) and all(needle[i] == digits[0][0] for i in needle_slots)
        if not split or len(needle_slots) != 2 * KEY_DIGITS or len(question_slots) != KEY_DIGITS:
            raise ValueError(
                "this tokenizer does not split digits into one token each: use PasskeyTask.make instead"
            )
        return PasskeyTemplate(
            needle=torch.tensor(needle),
            needle_slots=torch.tensor(needle_slots).view(2, KEY_DIGITS),
            question=torch.tensor(question),
            question_slots=torch.tensor(question_slots),
            digits=torch.tensor([ids[0] for ids in digits]),
        )

    def _shortest_document(self) -> int:
        keys = [str(digit) * KEY_DIGITS for digit in range(10)]
        longest = max(len(self.needle_ids(key)) + len(self._encode(QUESTION + key + "\n")) for key in keys)
        # Another key can take more tokens than five equal digits do, at most one per digit in three mentions.
        return len(self._start) + longest + 3 * KEY_DIGITS

    def _marked(self, key: str) -> tuple[list[int], list[int]]:
        return self.needle_ids(key), self._encode(QUESTION + key + "\n")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def leading_special_ids(tokenizer: Any) -> list[int]:
    """Return what a Hugging Face tokenizer puts before any text: a BOS token, or nothing."""
    plain, full = list(tokenizer.encode("a", add_special_tokens=False)), list(tokenizer.encode("a"))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def random_key(generator: random.Random) -> str:
    """Return five random digits; leading zeros occur."""
    return "".join(generator.choices("0123456789", k=KEY_DIGITS))


def _window(filler_ids: Filler, count: int, generator: random.Random) -> list[int]:
    """Return `count` consecutive ids from a random place, the filler repeated where it is too short."""
    total = len(filler_ids)
    if count and not total:
        raise ValueError("passkey filler is empty: give at least one token")
    start = generator.randrange(max(total - count, 0) + 1)
    window: list[int] = torch.as_tensor(filler_ids[start : start + count]).tolist()
    while len(window) < count:
        window.extend(window[: count - len(window)])
    return window
