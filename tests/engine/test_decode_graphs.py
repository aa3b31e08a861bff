"""What can be shown without a GPU: sizes, padding, and that the recorded function is a decode step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hrwkv.engine.build import fit_memory
from hrwkv.engine.decode_graphs import DecodeGraphs, batch_sizes, decode, padded_inputs
from hrwkv.engine.runner import UNREAD, Places
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.cache import HybridCache
from hrwkv.settings import EngineSettings
from tests.builders import cached_batch, hybrid_model, random_ids
from tests.engine.driver import Driver, greedy


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


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["startup", "lazy", "off"])
def test_recorded_steps_on_a_gpu_give_the_answers_alone(when: str) -> None:
    """Batches of changing size, prompts between them, preemption, forks; one step ahead of the host."""
    model = hybrid_model((2,), head_dim=32, eos_token_id=None).cuda()
    sizes = fit_memory(model, EngineSettings(max_sequences=6, block_size=4, cache_bytes=10**6))
    driver = Driver(
        model=model,
        sizes=replace(sizes, slots=6, blocks=24),
        max_sequences=6,
        device="cuda",
        cuda_graphs=when,
    )
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 9, 14, 5)]
    readers = [driver.add(prompt, greedy(12, n=2))[1] for prompt in prompts]
    driver.run()
    assert driver.core.totals.preempted > 0
    for prompt, reader in zip(prompts, readers, strict=True):
        ids = torch.tensor(prompt, device="cuda")
        for _ in range(12):
            batch = TokenBatch.from_lengths([len(ids)], device="cuda")
            with torch.no_grad():
                last = model.compute_logits(model(ids, batch)[-1:])
            ids = torch.cat([ids, last.argmax(-1)])
        assert [reader.tokens(index) for index in (0, 1)] == [tuple(ids[len(prompt) :].tolist())] * 2
    driver.assert_nothing_held()


def test_without_a_gpu_nothing_is_recorded() -> None:
    assert not DecodeGraphs.fit(hybrid_model())
