"""Batches made ahead are those made when asked for, their errors too."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrwkv.data.prefetch import Prefetch
from hrwkv.layers.batch import TokenBatch


class Numbers:
    """Batch i is the token i; the bookmark is the last one made; ``bad`` cannot be made."""

    def __init__(self, *, bad: int = -1) -> None:
        self.made: list[int] = []
        self.bad, self.at = bad, -1

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        if index == self.bad:
            raise ValueError(f"batch {index}: shard 7 is corrupt")
        self.made.append(index)
        self.at = index
        return torch.tensor([index]), TokenBatch.from_lengths([1])

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 4))
def test_any_order_of_indices_gives_their_batches_and_bookmarks(indices: list[int], depth: int) -> None:
    ahead = Prefetch(Numbers(), depth=depth)
    for index in indices:
        assert ahead.batch(index)[0].tolist() == [index]
        assert ahead.state_dict() == {"at": index}
    ahead.close()


def test_successive_batches_are_made_once_and_in_order_by_one_other_thread() -> None:
    rows = Numbers()
    ahead = Prefetch(rows, depth=3)
    for index in range(8):
        ahead.batch(index)
        ahead.batch(index)
    ahead.close()
    assert rows.made == list(range(len(rows.made)))
    assert 8 <= len(rows.made) <= 8 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_work_goes_on_before_it_is_asked_for() -> None:
    rows, reached = Numbers(), threading.Event()
    make = rows.batch

    def watched(index: int) -> tuple[Tensor, TokenBatch]:
        if index == 2:
            reached.set()
        return make(index)

    rows.batch = watched
    ahead = Prefetch(rows, depth=2)
    ahead.batch(0)
    assert reached.wait(timeout=60)
    ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_comes_with_its_own_batch_and_reason_and_again_when_asked_again(depth: int) -> None:
    ahead = Prefetch(Numbers(bad=3), depth=depth)
    assert [int(ahead.batch(index)[0]) for index in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 3: shard 7 is corrupt"):
            ahead.batch(3)
    assert int(ahead.batch(1)[0]) == 1
    ahead.close()


def test_loading_a_bookmark_throws_away_what_was_made_ahead() -> None:
    rows = Numbers()
    ahead = Prefetch(rows, depth=2)
    ahead.batch(0)
    ahead.load_state_dict({"at": 40})
    assert ahead.state_dict() == {"at": 40}
    assert int(ahead.batch(41)[0]) == 41
    ahead.close()


@pytest.mark.gpu
def test_pinned_batches_lie_in_page_locked_memory() -> None:
    token_ids, batch = Prefetch(Numbers(), depth=0, pin=True).batch(0)
    assert token_ids.is_pinned()
    assert batch.positions.is_pinned()
    assert batch.cu_seqlens.is_pinned()
