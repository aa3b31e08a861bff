from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.memory import MemorySizes, Pool
from hrwkv.settings import EngineSettings
from tests.builders import hybrid_config


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_no_item_has_two_takers_and_all_come_back(data: st.DataObject) -> None:
    """Against a plain count of owners."""
    pool, owners, held = Pool(6), [0] * 6, []
    for _ in range(data.draw(st.integers(0, 30))):
        kind = data.draw(st.sampled_from(["take", "share", "release"]))
        if kind == "take" and pool.free:
            taken = pool.take(data.draw(st.integers(0, pool.free)))
            assert all(owners[item] == 0 for item in taken)
            held.append(taken)
        elif kind == "share" and held:
            taken = data.draw(st.sampled_from(held)).copy()
            pool.share(taken)
            held.append(taken)
        elif kind == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        owners = [sum(taken.count(item) for taken in held) for item in range(6)]
        assert pool.used == sum(count > 0 for count in owners)
        assert pool.free + pool.used == 6
        assert pool.num_unshared(range(6)) == owners.count(1)


def fit(attention: tuple[int, ...], budget: int, **changes: int) -> MemorySizes:
    """State 1,024 bytes a linear layer, keys and values 512 bytes a layer and block of 4."""
    config = hybrid_config(attention)
    values = EngineSettings(**{"max_sequences": 8, "block_size": 4, **changes})
    return MemorySizes.fit(config, values, budget=budget, max_context=64, kv_itemsize=4, state_itemsize=4)


@pytest.mark.parametrize(
    ("attention", "budget", "slots", "blocks"),
    [
        ((2,), 10**6, 8, 8 * 16),  # no more blocks than 8 sequences of 64 tokens fill
        ((2,), 40_000, 6, (40_000 - 6 * 3072) // 512),  # half for states
        ((2,), 3072 + 512, 1, 1),
        ((), 40_000, 8, 0),
        ((), 9_000, 2, 0),
        ((0, 1, 2, 3), 40_000, 8, 40_000 // 2048),
    ],
)
def test_bytes_become_slots_and_blocks(
    attention: tuple[int, ...], budget: int, slots: int, blocks: int
) -> None:
    sizes = fit(attention, budget)
    assert (sizes.slots, sizes.blocks) == (slots, blocks)
    assert slots * sizes.slot_bytes + blocks * sizes.block_bytes <= budget
    assert sizes.kv_tokens == (blocks * 4 if attention else None)


def test_too_little_memory_is_told_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="3583 bytes, but one sequence needs 3072 for its state and 512"):
        fit((2,), 3583)
