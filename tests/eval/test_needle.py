import random

import pytest
import torch

from hrwkv.data.passkey import PasskeyTask
from hrwkv.eval.needle import passkey_grid

LENGTHS, DEPTHS = (150, 301), (0.0, 0.5, 1.0)


class ByteTokenizer:
    """One token per byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


FILLER = torch.tensor(ByteTokenizer().encode("a line of filler, and another one\n" * 30))


def oracle(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Read the key where it stands."""
    marker = b"The pass key is "
    texts = [bytes(prompt) for prompt in prompts]
    return [list(text[text.index(marker) + len(marker) :][:max_tokens]) for text in texts]


def grid_of(generate, *, lengths=LENGTHS, samples=3, seed=0, batch_size=4):
    task = PasskeyTask(ByteTokenizer())
    return passkey_grid(
        generate,
        task,
        filler_ids=FILLER,
        lengths=lengths,
        depths=DEPTHS,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
    )


def test_oracle_finds_every_key() -> None:
    grid = grid_of(oracle)
    assert grid.correct == ((3, 3, 3), (3, 3, 3))
    assert grid.accuracy == 1.0
    assert grid.by_length() == {150: 1.0, 301: 1.0}


def test_answers_are_counted_in_their_own_cell() -> None:
    """Right only in the second half of the prompt, and at one length."""

    def half_blind(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        place = [bytes(prompt).index(b"The pass key is") / len(prompt) for prompt in prompts]
        replies = oracle(prompts, max_tokens)
        return [
            reply if p > 0.5 and len(prompt) == 301 else reply[:-1]
            for reply, p, prompt in zip(replies, place, prompts, strict=True)
        ]

    grid = grid_of(half_blind)
    assert grid.correct == ((0, 0, 0), (0, 0, 3))
    assert grid.cell(301, 1.0) == 1.0
    assert grid.accuracy == pytest.approx(1 / 6)


def test_prompts_have_their_length_and_depend_on_their_cell_only() -> None:
    def recorder(seen: dict[tuple[int, ...], None]):
        def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
            seen.update(dict.fromkeys(map(tuple, prompts)))
            assert len({len(prompt) for prompt in prompts}) == 1
            return [[] for _ in prompts]

        return generate

    first: dict[tuple[int, ...], None] = {}
    again: dict[tuple[int, ...], None] = {}
    other: dict[tuple[int, ...], None] = {}
    random.seed(1)
    assert grid_of(recorder(first)).accuracy == 0.0
    random.seed(2)
    grid_of(recorder(again), lengths=(150, 200, 301), batch_size=2)
    grid_of(recorder(other), seed=1)
    assert sorted(map(len, first)) == [150] * 9 + [301] * 9
    assert set(first) < set(again)
    assert not set(first) & set(other)


def test_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples: expected at least 1"):
        grid_of(oracle, samples=0)


def test_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="passkey prompt of 20 tokens is too short"):
        grid_of(oracle, lengths=(20,))
