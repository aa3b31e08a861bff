"""Rows of several sources in exact shares, as random access as the sources themselves.

Which source a row comes from is a fixed periodic pattern and no random draw: before any row, no source is a
whole row away from its share. So a short run has the mixture that its recipe states, and a batch is still a
function of its index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hrwkv.layers.batch import TokenBatch

# Longest pattern; weights that need a longer one are rounded to parts of this.
MAX_PERIOD = 1 << 16


class Rows(Protocol):
    """Packed batches by their index, and a bookmark that makes going on at the next one quick."""

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Return token ids [T] int64 and their sequences; the same for the same `index`, in any order."""

    def state_dict(self) -> dict[str, Any]:
        """Return where reading stands, for JSON; it never changes a batch, only how soon it is there."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""


class Schedule:
    """A source for each row: shares of `weights` (at least one, all above 0), in Tijdeman's order.

    Before every row n, source k has had between n * share - 1 and n * share + 1 rows, both excluded (half a
    row for two sources); source: R. Tijdeman, The chairman assignment problem, 1980.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        parts = whole_parts(weights)
        self.period, count = sum(parts), len(parts)
        taken, order = [0] * count, []
        before = np.zeros((self.period + 1, count), dtype=np.int64)
        for row in range(self.period):
            order.append(_next_source(parts, taken, row + 1))
            taken[order[-1]] += 1
            before[row + 1] = taken
        self._order, self._before = order, before

    def place(self, row: int) -> tuple[int, int]:
        """Return the source of row `row` and which of that source's rows it is, from 0."""
        source = self._order[row % self.period]
        return source, self.rows_before(row)[source]

    def rows_before(self, row: int) -> list[int]:
        """Return how many of the rows 0 to row - 1 each source has."""
        periods, place = divmod(row, self.period)
        counts: list[int] = (periods * self._before[-1] + self._before[place]).tolist()
        return counts


def whole_parts(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers in the ratio of `weights`, as decimals; of sum <= 65,536, rounded."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(share.denominator for share in exact))
    parts = [int(share * scale) for share in exact]
    common = math.gcd(*parts)
    parts = [part // common for part in parts]
    if sum(parts) <= MAX_PERIOD:
        return parts
    total = sum(parts)
    return [max(round(Fraction(part, total) * MAX_PERIOD), 1) for part in parts]


def _next_source(parts: list[int], taken: list[int], row: int) -> int:
    """Return the source with the earliest deadline among those that are due (Tijdeman's rule)."""
    total, bound = sum(parts), 2 * len(parts) - 2
    if not bound:
        return 0
    # lag = bound * total * (row * share - taken), so that everything is a whole number.
    lags = [bound * (row * part - total * have) for part, have in zip(parts, taken, strict=True)]
    due = [source for source, lag in enumerate(lags) if lag >= total]
    return min(due, key=lambda source: (Fraction((bound - 1) * total - lags[source], parts[source]), source))


class MixedRows:
    """Batches of `rows_per_batch` rows from sources of single rows, in the shares of a schedule.

    sources: one for each weight of the schedule; ``batch(i)`` of each is its row i.
    """

    def __init__(self, sources: Sequence[Rows], schedule: Schedule, *, rows_per_batch: int) -> None:
        self.sources, self.schedule, self.rows_per_batch = sources, schedule, rows_per_batch

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Return token ids [T] int64 and their sequences, on the CPU; the same for the same `index`."""
        first = index * self.rows_per_batch
        places = [self.schedule.place(first + number) for number in range(self.rows_per_batch)]
        rows = [self.sources[source].batch(row) for source, row in places]
        lengths = [length for _, batch in rows for length in batch.lengths]
        return torch.cat([token_ids for token_ids, _ in rows]), TokenBatch.from_lengths(lengths)

    def batches_within(self, available: Sequence[int], *, most: int) -> int:
        """Return how many batches, at most `most`, take no more rows of each source than are `available`."""
        count = 0
        while count < most:
            needed = self.schedule.rows_before((count + 1) * self.rows_per_batch)
            if any(rows > own for rows, own in zip(needed, available, strict=True)):
                break
            count += 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """Return the sources' bookmarks."""
        return {"sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the sources their bookmarks."""
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
