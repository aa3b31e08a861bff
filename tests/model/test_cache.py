import pytest
import torch

from hrwkv.model.cache import HostPages, HybridCache, kv_bytes_per_token, state_bytes
from tests.builders import hybrid_config


@pytest.mark.parametrize("kept", [(), (2,), (1, 3), (0, 1, 2, 3)])
def test_bytes_are_those_that_are_allocated(kept: tuple[int, ...]) -> None:
    config = hybrid_config(kept, num_attention_heads=6, num_key_value_heads=3)
    cache = HybridCache.allocate(config, slots=1, blocks=1, block_size=1, dtype=torch.bfloat16)
    assert state_bytes(4 - len(kept), num_heads=6, head_dim=8) == sum(state.nbytes for state in cache.state)
    assert kv_bytes_per_token(len(kept), num_kv_heads=3, head_dim=8) == sum(
        tensor.nbytes for tensor in (*cache.k_cache, *cache.v_cache)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 100], ids=["in-parts", "at-once"])
@pytest.mark.parametrize("kept", [(), (2,), (0, 1, 2, 3)], ids=["all-linear", "hybrid", "all-attention"])
def test_a_sequence_moves_to_the_host_and_back_elsewhere(
    kept: tuple[int, ...], rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pages in any order, of several slabs; two sequences, through the same rows on the device."""
    cache = HybridCache.allocate(hybrid_config(kept), slots=4, blocks=7, block_size=2, device=device)
    for memory in (*cache.state, *cache.k_cache, *cache.v_cache):
        memory.normal_()
    pools = [*cache.k_cache, *cache.v_cache]
    before = [memory.clone() for memory in (*cache.state, *pools)]
    page_bytes = sum(pool[0].nbytes for pool in pools) or sum(state[0].nbytes for state in cache.state)
    monkeypatch.setattr("hrwkv.model.cache.STAGING_BYTES", rows * page_bytes)
    monkeypatch.setattr("hrwkv.model.cache.SLAB_BYTES", 5 * page_bytes)
    pages = HostPages(cache, 37, page_bytes=page_bytes, num_ready=12)
    num = -(-sum(state[0].nbytes for state in cache.state) // page_bytes)
    first, second = list(range(34, 34 - num, -1)), list(range(num))
    pages.save(2, state=first, blocks=[(4, 36), (1, 35)] if pools else [])
    pages.save(3, state=second, blocks=[(6, 20)] if pools else [])
    for memory in (*cache.state, *pools):
        memory.zero_()
    pages.load(0, state=first, blocks=[(1, 36), (3, 35)] if pools else [])
    pages.load(1, state=second, blocks=[(0, 20)] if pools else [])
    for state, old in zip(cache.state, before, strict=False):
        assert torch.equal(state[:2], old[[2, 3]])
        assert not state[2:].any()
    for pool, old in zip(pools, before[len(cache.state) :], strict=True):
        assert torch.equal(pool[[1, 3, 0]], old[[4, 1, 6]])
        assert not pool[[2, 4, 5, 6]].any()


def test_more_pages_than_a_machine_has_cost_nothing_before_they_are_written() -> None:
    cache = HybridCache.allocate(hybrid_config((2,)), slots=1, blocks=1, block_size=2)
    pages = HostPages(cache, 2**50, page_bytes=256)
    pages.save(0, state=[], blocks=[(0, 2**49)])
    assert [slab.nbytes for slab in pages._slabs.values()] == [2**27]


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
