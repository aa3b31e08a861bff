"""``TokenBatch``: which of the packed tokens belong to which sequence, and where their memory lies.

Sequences are concatenated along one time axis of T tokens, without padding: the same value describes a
training batch, a prefill, a piece of one, and a decode step. It holds indices only; the memory that the
indices point into is ``HybridCache``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Indices of N packed sequences with T tokens in all. The cache fields are None without a cache.

    positions: [T] int64, the position of each token in its sequence, earlier cached tokens counted.
    cu_seqlens: [N+1] int32, where each sequence's tokens start and end in the packed axis.
    lengths: N ints >= 0, the host's copy of ``cu_seqlens.diff()``, so that no kernel waits for a device.
    state_slots: [N] int64, each sequence's slot in the state pool, all different.
    block_tables: [N, M] int64, each sequence's KV blocks in order.
    slot_mapping: [T] int64, ``block * block_size + offset`` where each token's key and value are stored.
    context_lens: [N] int64, tokens of each sequence in the KV cache, these included.
    contexts: N ints, the host's copy of ``context_lens`` where the caller has it: on a GPU it saves copies.
    context_starts: [N] int64, the first cached token that may be attended to (left padding); None is 0.
    """

    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    state_slots: Tensor | None = None
    block_tables: Tensor | None = None
    slot_mapping: Tensor | None = None
    context_lens: Tensor | None = None
    contexts: tuple[int, ...] | None = None
    context_starts: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> TokenBatch:
        """Whole sequences from position 0, without a cache. Raises ValueError on a negative length."""
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths must be >= 0, got {lengths}")
        counts = torch.tensor(lengths, dtype=torch.int64)
        ends = counts.cumsum(0)
        starts = (ends - counts).repeat_interleave(counts)
        positions = torch.arange(int(counts.sum()), dtype=torch.int64) - starts
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        return cls(positions=positions.to(device), cu_seqlens=cu_seqlens.to(device), lengths=lengths)

    @property
    def num_single(self) -> int:
        """How many sequences at the beginning bring exactly one token each."""
        return sum(1 for _ in takewhile(lambda length: length == 1, self.lengths))

    @property
    def is_decode(self) -> bool:
        """True when every sequence brings exactly one token, so that a mixer may take its one-launch step."""
        return all(length == 1 for length in self.lengths)
