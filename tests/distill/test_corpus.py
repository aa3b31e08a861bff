"""Rows come from everywhere, each once in an epoch, and a batch is a function of its index."""

import numpy as np
import pytest
import torch

from hrwkv.data.tokens import TokenStore
from hrwkv.distill.corpus import SpreadRows

CONTEXT = 8


def stream(num_rows: int) -> SpreadRows:
    """One document whose token at place i is i, so that a row's first token tells the row."""
    store = TokenStore.from_documents([np.arange(num_rows * CONTEXT)])
    return SpreadRows(store, context_length=CONTEXT, seed=0, passkey=None)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 60, 144])
def test_every_row_comes_once_in_each_epoch(num_rows: int) -> None:
    rows = stream(num_rows)
    for epoch in range(2):
        places = range(epoch * num_rows, (epoch + 1) * num_rows)
        assert sorted(rows.row(place) for place in places) == list(places)


def test_successive_rows_are_far_apart() -> None:
    rows = stream(144)
    for start in range(0, 144 - 8):
        eight = sorted(rows.row(place) for place in range(start, start + 8))
        assert min(b - a for a, b in zip(eight, eight[1:], strict=False)) >= 144 // 16


def test_a_row_depends_on_its_index_only() -> None:
    rows = stream(60)
    token_ids, batch = rows.batch(17)
    assert torch.equal(token_ids, torch.arange(CONTEXT) + rows.row(17) * CONTEXT)
    assert batch.lengths == (CONTEXT,)
    rows.batch(40)
    assert torch.equal(rows.batch(17)[0], token_ids)
