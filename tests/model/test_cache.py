import pytest
import torch

from hrwkv.model.cache import HybridCache, kv_bytes_per_token, state_bytes
from tests.builders import hybrid_config


@pytest.mark.parametrize("kept", [(), (2,), (1, 3), (0, 1, 2, 3)])
def test_bytes_are_those_that_are_allocated(kept: tuple[int, ...]) -> None:
    config = hybrid_config(kept, num_attention_heads=6, num_key_value_heads=3)
    cache = HybridCache.allocate(config, slots=1, blocks=1, block_size=1, dtype=torch.bfloat16)
    assert state_bytes(4 - len(kept), num_heads=6, head_dim=8) == sum(state.nbytes for state in cache.state)
    assert kv_bytes_per_token(len(kept), num_kv_heads=3, head_dim=8) == sum(
        tensor.nbytes for tensor in (*cache.k_cache, *cache.v_cache)
    )


@pytest.mark.parametrize("kept", [(), (2,), (0, 1, 2, 3)], ids=["all-linear", "hybrid", "all-attention"])
def test_a_sequence_moves_to_the_host_and_back_elsewhere(kept: tuple[int, ...]) -> None:
    cache = HybridCache.allocate(hybrid_config(kept), slots=3, blocks=5, block_size=2)
    for memory in (*cache.state, *cache.k_cache, *cache.v_cache):
        memory.normal_()
    before = [memory.clone() for memory in (*cache.state, *cache.k_cache, *cache.v_cache)]
    snapshot = cache.save(2, [4, 1])
    cache.clear_state(2)
    assert not any(bool(state[2].any()) for state in cache.state)
    cache.load(snapshot, 0, blocks=[1, 3])
    for state, old in zip(cache.state, before, strict=False):
        assert torch.equal(state[0], old[2])
        assert torch.equal(state[1], old[1])
    pools = [*cache.k_cache, *cache.v_cache]
    for memory, old in zip(pools, before[len(cache.state) :], strict=True):
        assert torch.equal(memory, old[[0, 4, 2, 1, 4]])


@pytest.mark.parametrize("kept", [(), (2,), (0, 1, 2, 3)], ids=["all-linear", "hybrid", "all-attention"])
def test_a_copied_sequence_leaves_the_first_alone(kept: tuple[int, ...]) -> None:
    cache = HybridCache.allocate(hybrid_config(kept), slots=2, blocks=4, block_size=2)
    for memory in (*cache.state, *cache.k_cache, *cache.v_cache):
        memory.normal_()
    states = [state.clone() for state in cache.state]
    pools = [*cache.k_cache, *cache.v_cache]
    before = [memory.clone() for memory in pools]
    cache.copy_sequence(1, 0, blocks=[(2, 3)])
    for state, old in zip(cache.state, states, strict=True):
        assert torch.equal(state, old[[1, 1]])
    for memory, old in zip(pools, before, strict=True):
        assert torch.equal(memory, old[[0, 1, 2, 2]])
