"""What can be shown without a GPU: sizes, padding, and that the recorded function is a decode step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hrwkv.engine.decode_graphs import DecodeGraphs, batch_sizes, decode, padded_inputs
from hrwkv.engine.runner import UNREAD, Places
from hrwkv.model.cache import HybridCache
from tests.builders import cached_batch, hybrid_model, random_ids


@pytest.mark.parametrize("most", [1, 2, 3, 5, 64, 100, 256])
def test_no_batch_is_padded_by_more_than_a_third(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for num in range(1, most + 1):
        size = next(size for size in sizes if size >= num)
        assert 3 * (size - num) <= size


def places(tokens: list[int]) -> Places:
    column = np.array([4, 9], dtype=np.int64)
    return Places(
        tokens=np.array(tokens, dtype=np.int64),
        positions=column,
        slot_mapping=np.array([4, 11], dtype=np.int64),
        token_slots=np.array([0, 1], dtype=np.int64),
        slots=np.array([0, 1], dtype=np.int64),
        contexts=column + 1,
    )


def test_padding_owns_no_memory() -> None:
    inputs = padded_inputs(places([5, 6]), 4, spare=2)
    tokens, positions, slot_mapping, rows, contexts, state_slots = inputs.tolist()
    assert (tokens, positions, contexts) == ([5, 6, 0, 0], [4, 9, 0, 0], [5, 10, 0, 0])
    assert slot_mapping == [4, 11, -1, -1]
    assert (rows, state_slots) == ([0, 1, 2, 2], [0, 1, -1, -1])


@torch.inference_mode()
def test_the_recorded_function_is_a_decode_step() -> None:
    """Two sequences whose prompts are cached, one with its last token still on the device."""
    model = hybrid_model((2,))
    prompts, blocks, size = [random_ids(4), random_ids(9, seed=1)], [[0, 1], [2, 3, 4]], 4
    caches = [HybridCache.allocate(model.config, slots=2, blocks=5, block_size=size) for _ in range(2)]
    read = cached_batch([range(4), range(9)], slots=[0, 1], blocks=blocks, block_size=size)
    for cache in caches:
        model(torch.cat(prompts), read, cache)
    step = cached_batch([range(4, 5), range(9, 10)], slots=[0, 1], blocks=blocks, block_size=size)
    expected = model.compute_logits(model(torch.tensor([5, 6]), step, caches[0]))
    tables = torch.tensor([[0, 1, 0], [2, 3, 4], [0, 0, 0]])
    where = places([5, UNREAD])
    assert step.slot_mapping is not None
    found = decode(
        model,
        caches[1],
        torch.from_numpy(
            padded_inputs(
                Places(
                    where.tokens,
                    where.positions,
                    step.slot_mapping.numpy(),
                    where.token_slots,
                    where.slots,
                    where.contexts,
                ),
                2,
                spare=2,
            )
        ),
        tables=tables,
        last_tokens=torch.tensor([50, 6, 0]),
    )
    torch.testing.assert_close(found, expected)
    for first, second in zip(caches[0].state, caches[1].state, strict=True):
        torch.testing.assert_close(first, second)


def test_without_a_gpu_nothing_is_recorded() -> None:
    assert not DecodeGraphs.fit(hybrid_model())
