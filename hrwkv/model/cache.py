"""``HybridCache``: the memory of a hybrid, a state pool and paged KV; its bytes; no policy, no bookkeeping.

Who owns which slot and block is told by a ``TokenBatch``; who may have one is the engine's decision.
``HostPages`` hold copies of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrwkv.model.config import LINEAR, HybridConfig

STATE_ITEMSIZE = 4  # The state is fp32 whatever the weights are.
# Pages are allocated so many bytes at a time: torch rounds page-locked memory up to a power of two.
SLAB_BYTES = 2**27
# Bytes on the device through which copies to and from the host pass.
STAGING_BYTES = 2**26


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


class HostPages:
    """Copies of sequences in the host's memory, in pages of one size; who owns which is told from outside.

    A page holds the keys and values of one block in every attention layer; a state fills as many as it needs.
    Beside a GPU the pages are locked, which takes as long as ten copies, so each is locked only once. No copy
    makes the host wait: what leaves is gathered on the device and copied in a stream of its own, while later
    steps compute; what comes back waits for that stream, on the device.
    """

    def __init__(self, cache: HybridCache, count: int, *, page_bytes: int, num_ready: int = 0) -> None:
        """Room for ``count`` pages of ``page_bytes``: a block's, or any without attention layers.

        num_ready: the first pages, which beside a GPU are locked now; others when they are first written to.
        Raises RuntimeError if the host cannot lock so much.
        """
        self._cache, self._page_bytes = cache, page_bytes
        self._pools = (*cache.k_cache, *cache.v_cache)
        some = (*cache.state, *self._pools)[0]
        self._is_pinned = some.is_cuda
        self._stream = torch.cuda.Stream(some.device) if self._is_pinned else None
        self._per_slab = max(1, SLAB_BYTES // page_bytes)
        self._count = count
        self._slabs: dict[int, Tensor] = {}
        # Through these rows on the device everything passes, a whole state at once.
        state = sum(each[0].nbytes for each in cache.state)
        rows = min(count, max(-(-state // page_bytes), STAGING_BYTES // page_bytes, 1))
        self._staging = torch.empty((rows, page_bytes), dtype=torch.uint8, device=some.device)
        if self._is_pinned:
            for number in range(-(-num_ready // self._per_slab)):
                self._slab(number)

    def save(self, slot: int, *, state: Sequence[int], blocks: Sequence[tuple[int, int]]) -> None:
        """Copy a slot's state to the pages ``state``, and of each pair the block to the page."""
        if state:
            self._wait_for_copies()
            torch.stack([each[slot] for each in self._cache.state], out=self._as_state())
            self._send(state)
        for pairs in self._parts(blocks):
            self._wait_for_copies()
            rows = self._rows(block for block, _ in pairs)
            for place, pool in enumerate(self._pools):
                self._as_blocks()[: len(pairs), place] = pool[rows]
            self._send([page for _, page in pairs])

    def load(self, slot: int, *, state: Sequence[int], blocks: Sequence[tuple[int, int]]) -> None:
        """Copy pages back: to a slot's state, and to each pair's block."""
        self._wait_for_copies()
        if state:
            self._fetch(state)
            torch._foreach_copy_([each[slot] for each in self._cache.state], list(self._as_state()))
        for pairs in self._parts(blocks):
            self._fetch([page for _, page in pairs])
            rows = self._rows(block for block, _ in pairs)
            for place, pool in enumerate(self._pools):
                pool[rows] = self._as_blocks()[: len(pairs), place]

    def _parts(self, blocks: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        """As many at a time as there are rows to pass through."""
        size = len(self._staging)
        return (blocks[begin : begin + size] for begin in range(0, len(blocks), size))

    def _as_state(self) -> Tensor:
        """The first rows as a state [L, H, K, K]."""
        like = self._cache.state[0]
        shape = (len(self._cache.state), *like.shape[1:])
        return self._staging.view(-1)[: math.prod(shape) * like.itemsize].view(like.dtype).view(shape)

    def _as_blocks(self) -> Tensor:
        """The rows as blocks [rows, 2 L, block_size, H_kv, K]: all keys, then all values."""
        like = self._pools[0]
        return self._staging.view(like.dtype).view(-1, len(self._pools), *like.shape[1:])

    def _rows(self, blocks: Iterable[int]) -> Tensor:
        rows = torch.tensor(list(blocks), dtype=torch.int64)
        return rows.pin_memory().to(self._staging.device, non_blocking=True) if self._is_pinned else rows

    def _wait_for_copies(self) -> None:
        """Begin nothing on the device before what leaves has left."""
        if self._stream is not None:
            torch.cuda.current_stream(self._staging.device).wait_stream(self._stream)

    def _send(self, pages: Sequence[int]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._staging.device))
        with torch.cuda.stream(self._stream):  # None: no other one
            for rows, kept in self._runs(pages):
                kept.copy_(rows, non_blocking=True)

    def _fetch(self, pages: Sequence[int]) -> None:
        for rows, kept in self._runs(pages):
            rows.copy_(kept, non_blocking=True)

    def _runs(self, pages: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows on the device with the pages that belong to them, neighbours together."""
        begin = 0
        for end in range(1, len(pages) + 1):
            if end == len(pages) or pages[end] != pages[end - 1] + 1 or not pages[end] % self._per_slab:
                slab, first = divmod(pages[begin], self._per_slab)
                yield self._staging[begin:end], self._slab(slab)[first : first + end - begin]
                begin = end

    def _slab(self, number: int) -> Tensor:
        """Pages that are allocated together."""
        if number not in self._slabs:
            rows = min(self._per_slab, self._count - number * self._per_slab)
            shape = (rows, self._page_bytes)
            self._slabs[number] = torch.empty(shape, dtype=torch.uint8, pin_memory=self._is_pinned)
        return self._slabs[number]
