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
class Snapshot:
    """A copy of one sequence's memory: state [L, H, K, K], keys and values [L, blocks, block_size, H_kv, K].

    L counts the layers of that kind; None where there are none.
    """

    state: Tensor | None
    keys: Tensor | None
    values: Tensor | None


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

    def clear_state(self, slot: int) -> None:
        """Give a slot the state of a sequence that has read nothing."""
        if self.state:
            torch._foreach_zero_([state[slot] for state in self.state])

    def copy_sequence(self, slot: int, to: int, *, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy a state to slot ``to``, and each pair's first block of keys and values to its second."""
        pairs = [(state[to], state[slot]) for state in self.state]
        pairs += [(kv[new], kv[old]) for kv in (*self.k_cache, *self.v_cache) for old, new in blocks]
        if pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def save(self, slot: int, blocks: Sequence[int]) -> Snapshot:
        """A copy of one sequence's memory in the host's memory; waits for the device."""

        rows = torch.tensor(blocks, dtype=torch.int64)
        return Snapshot(
            state=torch.stack([state[slot] for state in self.state]).cpu() if self.state else None,
            keys=_gather(self.k_cache, rows),
            values=_gather(self.v_cache, rows),
        )

    def load(self, snapshot: Snapshot, slot: int, *, blocks: Sequence[int]) -> None:
        """Write a saved sequence into a slot and as many blocks as it had."""
        if snapshot.state is not None:
            for state, part in zip(self.state, snapshot.state.to(self.state[0].device), strict=True):
                state[slot] = part
        rows = torch.tensor(blocks, dtype=torch.int64)
        for pools, saved in ((self.k_cache, snapshot.keys), (self.v_cache, snapshot.values)):
            if saved is not None:
                device = pools[0].device
                for pool, part in zip(pools, saved.to(device), strict=True):
                    pool[rows.to(device)] = part


def _gather(pools: Sequence[Tensor], rows: Tensor) -> Tensor | None:
    """Rows of every pool on the host, [L, rows, ...]; None without pools."""
    if not pools:
        return None
    rows = rows.to(pools[0].device)
    return torch.stack([pool[rows] for pool in pools]).cpu()
