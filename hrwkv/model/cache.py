"""``HybridCache``: the memory of a hybrid, a state pool and paged KV; its bytes; no policy, no bookkeeping.

Who owns which slot and block is told by a ``TokenBatch``; who may have one is the engine's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrwkv.model.config import LINEAR, HybridConfig

STATE_ITEMSIZE = 4  # The state is fp32 whatever the weights are.


def state_bytes(layers: int, *, num_heads: int, head_dim: int) -> int:
    """Bytes of one sequence's state in so many RWKV-7 layers, whatever its length (hxa079.md, section 3)."""
    return layers * num_heads * head_dim**2 * STATE_ITEMSIZE


def kv_bytes_per_token(layers: int, *, num_kv_heads: int, head_dim: int, itemsize: int = 2) -> int:
    """Bytes of one token's keys and values in so many attention layers; itemsize: of an element (2: bf16)."""
    return layers * 2 * num_kv_heads * head_dim * itemsize


@dataclass(frozen=True)
class HybridCache:
    """Per-layer memory, written in place by the forward.

    state: one [slots, H, K, K] tensor per linear layer, fp32 (key axis, then value axis).
    k_cache, v_cache: one [blocks, block_size, H_kv, K] tensor per full-attention layer, any strides.
    """

    state: Sequence[Tensor]
    k_cache: Sequence[Tensor]
    v_cache: Sequence[Tensor]

    @classmethod
    def allocate(
        cls,
        config: HybridConfig,
        *,
        slots: int,
        blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> HybridCache:
        """Zeroed memory for ``slots`` sequences and ``blocks * block_size`` tokens of keys and values."""
        size = config.head_dim
        state_shape = (len(config.linear_layers), slots, config.num_attention_heads, size, size)
        kv_shape = (len(config.full_layers), blocks, block_size, config.num_key_value_heads, size)
        return cls(
            state=torch.zeros(state_shape, dtype=state_dtype, device=device).unbind(),
            k_cache=torch.zeros(kv_shape, dtype=dtype, device=device).unbind(),
            v_cache=torch.zeros(kv_shape, dtype=dtype, device=device).unbind(),
        )

    def by_layer(self, config: HybridConfig) -> list[tuple[Tensor, ...]]:
        """Each layer's memory in order: ``(state,)`` or ``(k_cache, v_cache)``."""
        states, keys, values = iter(self.state), iter(self.k_cache), iter(self.v_cache)
        return [
            (next(states),) if kind == LINEAR else (next(keys), next(values))
            for kind in config.layer_types or []
        ]
