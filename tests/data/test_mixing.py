"""Shares are exact over every stretch of rows, and a row's source is a function of its index."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrwkv.data.mixing import MixedRows, Schedule, whole_parts
from hrwkv.layers.batch import TokenBatch

weights_of_sources = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(weights_of_sources, st.integers(0, 400))
def test_no_source_is_ever_a_row_away_from_its_share(weights: list[int], start: int) -> None:
    schedule, total = Schedule(weights), sum(weights)
    bound = 1 - Fraction(1, max(2 * len(weights) - 2, 1)) if len(weights) > 1 else 0
    for row in range(start, start + 60):
        counts = schedule.rows_before(row)
        assert sum(counts) == row
        assert all(
            abs(count - Fraction(row * weight, total)) <= bound
            for count, weight in zip(counts, weights, strict=True)
        )


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 50), st.integers(1, 50)), st.integers(0, 300), st.integers(1, 300))
def test_any_window_of_two_sources_is_within_one_row(weights: tuple, start: int, length: int) -> None:
    schedule = Schedule(weights)
    before, after = schedule.rows_before(start), schedule.rows_before(start + length)
    for source in range(2):
        share = Fraction(length * weights[source], sum(weights))
        assert abs(after[source] - before[source] - share) <= 1


@settings(deadline=None, max_examples=30)
@given(weights_of_sources)
def test_each_source_gives_its_rows_one_after_another(weights: list[int]) -> None:
    schedule = Schedule(weights)
    seen = [0] * len(weights)
    for row in range(2 * schedule.period + 3):
        source, place = schedule.place(row)
        assert place == seen[source]
        seen[source] += 1


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([4, 2, 2], [2, 1, 1]),
        ([0.25, 0.5], [1, 2]),
        ([1e-3, 1], [1, 1000]),
    ],
)
def test_decimal_weights_are_exact(weights: list[float], parts: list[int]) -> None:
    assert whole_parts(weights) == parts


def test_long_decimals_are_rounded_to_the_longest_pattern() -> None:
    parts = whole_parts([0.123456789, 0.876543211])
    assert sum(parts) == 1 << 16
    assert parts[0] / sum(parts) == pytest.approx(0.123456789, abs=2**-17)


class Counted:
    """Row i of source s is the tokens [s, i]."""

    def __init__(self, source: int) -> None:
        self.source, self.bookmark = source, 0

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        self.bookmark = index
        return torch.tensor([self.source, index]), TokenBatch.from_lengths([1, 1])

    def state_dict(self) -> dict:
        return {"at": self.bookmark}

    def load_state_dict(self, state: dict) -> None:
        self.bookmark = state["at"]


def test_a_batch_is_the_rows_of_the_schedule_and_its_bookmarks_are_theirs() -> None:
    schedule = Schedule([3, 1])
    mixed = MixedRows([Counted(0), Counted(1)], schedule, rows_per_batch=3)
    for index in (4, 0, 1):
        token_ids, batch = mixed.batch(index)
        rows = [schedule.place(3 * index + number) for number in range(3)]
        assert token_ids.tolist() == [token for row in rows for token in row]
        assert batch.lengths == (1,) * 6
    other = MixedRows([Counted(0), Counted(1)], schedule, rows_per_batch=3)
    other.load_state_dict(mixed.state_dict())
    assert other.state_dict() == mixed.state_dict()
    assert [source.bookmark for source in other.sources] == [source.bookmark for source in mixed.sources]
