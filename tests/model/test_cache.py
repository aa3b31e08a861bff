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
