"""Passkey retrieval over a grid of length and depth, by greedy generation and exact match.

The prompts depend on the seed, the length and the depth only, so every model of a comparison answers the same
ones, and a cell stays the same when the grid around it grows.

Left out: several needles, other keys than five digits, partial credit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hrwkv.data.passkey import PasskeyTask, random_key

# generate(prompts, max_tokens) -> the new token ids of each prompt, greedily chosen, at most max_tokens of
# them.
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Grid:
    """Right answers per cell.

    lengths: prompt lengths in tokens. depths: where the key lies, 0 (start) to 1 (end). samples: prompts per
    cell. correct: [len(lengths)][len(depths)] counts.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    correct: tuple[tuple[int, ...], ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers over the whole grid, 0 to 1."""
        return sum(map(sum, self.correct)) / (self.samples * len(self.lengths) * len(self.depths))

    def cell(self, length: int, depth: float) -> float:
        """Share of right answers of one cell, 0 to 1."""
        return self.correct[self.lengths.index(length)][self.depths.index(depth)] / self.samples

    def by_length(self) -> dict[int, float]:
        """Share of right answers per length, over all depths."""
        asked = self.samples * len(self.depths)
        return {length: sum(row) / asked for length, row in zip(self.lengths, self.correct, strict=True)}


def passkey_grid(
    generate: Generate,
    task: PasskeyTask,
    *,
    filler_ids: Sequence[int] | Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    batch_size: int = 32,
) -> Grid:
    """Ask for ``samples`` keys per cell and count the answers that match exactly.

    generate: greedy; prompts of one call have equal lengths. filler_ids: [n] token ids of the text around
    the key. batch_size: prompts per call of ``generate``.

    Raises ValueError when the grid is empty, ``samples`` < 1 or a length leaves no room for needle and
    question.
    """
    if not lengths or not depths or samples < 1:
        raise ValueError(
            f"a passkey grid of {len(lengths)} lengths, {len(depths)} depths and {samples} samples: "
            "expected at least 1 of each"
        )
    correct = []
    for length in lengths:
        asked = [
            _ask(task, filler_ids, length=length, depth=depth, seed=seed, sample=sample)
            for depth in depths
            for sample in range(samples)
        ]
        right = _count_right(generate, asked, batch_size)
        correct.append(tuple(sum(right[i : i + samples]) for i in range(0, len(asked), samples)))
    return Grid(lengths=tuple(lengths), depths=tuple(depths), samples=samples, correct=tuple(correct))


def _ask(
    task: PasskeyTask,
    filler_ids: Sequence[int] | Tensor,
    *,
    length: int,
    depth: float,
    seed: int,
    sample: int,
) -> tuple[list[int], list[int]]:
    """Prompt and answer of one sample."""
    generator = random.Random(f"{seed} {length} {depth} {sample}")
    key = random_key(generator)
    return task.make(filler_ids, length=length, depth=depth, key=key, generator=generator)


def _count_right(generate: Generate, asked: list[tuple[list[int], list[int]]], batch_size: int) -> list[bool]:
    """For each (prompt, answer), whether the model's first tokens are the answer."""
    right = []
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        replies = generate([prompt for prompt, _ in part], max(len(answer) for _, answer in part))
        right += [reply[: len(answer)] == answer for reply, (_, answer) in zip(replies, part, strict=True)]
    return right
