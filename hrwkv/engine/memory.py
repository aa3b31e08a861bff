"""Who holds which state slot and KV block: counts only, the tensors are a ``HybridCache``.

Full blocks of a prompt are shared by the answers to it, so blocks have reference counts; a block that is
still written to has one owner. Left out: sharing between requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hrwkv.model.cache import kv_bytes_per_token, state_bytes
from hrwkv.model.config import HybridConfig
from hrwkv.settings import EngineSettings

# Of the cache's bytes: more sequences than this share of states leaves would find no room for their keys.
MAX_STATE_SHARE = 0.5


class Pool:
    """Numbers 0 to ``total - 1``, taken, shared and given back."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owners = [0] * total

    @property
    def free(self) -> int:
        """How many can be taken."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many have an owner."""
        return self.total - len(self._free)

    def take(self, count: int) -> list[int]:
        """So many free ones, which have one owner now; there must be enough."""
        assert 0 <= count <= len(self._free)
        taken = [self._free.pop() for _ in range(count)]
        for item in taken:
            self._owners[item] = 1
        return taken

    def share(self, items: Iterable[int]) -> None:
        """One owner more for each."""
        for item in items:
            assert self._owners[item] > 0
            self._owners[item] += 1

    def num_unshared(self, items: Iterable[int]) -> int:
        """How many of them have one owner."""
        return sum(self._owners[item] == 1 for item in items)

    def release(self, items: Iterable[int]) -> None:
        """One owner less for each; without any it is free."""
        for item in items:
            assert self._owners[item] > 0
            self._owners[item] -= 1
            if not self._owners[item]:
                self._free.append(item)


@dataclass(frozen=True)
class MemorySizes:
    """What a cache of some bytes holds; slots are counted without states too, they number the sequences."""

    slots: int
    blocks: int
    block_size: int
    slot_bytes: int
    block_bytes: int

    @classmethod
    def fit(
        cls,
        config: HybridConfig,
        settings: EngineSettings,
        *,
        budget: int,
        max_context: int,
        kv_itemsize: int,
        state_itemsize: int,
    ) -> MemorySizes:
        """Divide ``budget`` bytes: states of max_sequences or of half the bytes, then keys and values.

        Raises ValueError, with the numbers, if not one sequence of one block fits.
        """
        size, heads = config.head_dim, config.num_attention_heads
        slot = state_bytes(len(config.linear_layers), num_heads=heads, head_dim=size) * state_itemsize // 4
        token = kv_bytes_per_token(
            len(config.full_layers),
            num_kv_heads=config.num_key_value_heads,
            head_dim=size,
            itemsize=kv_itemsize,
        )
        block = token * settings.block_size
        if slot + block > budget:
            raise ValueError(
                f"the cache has {budget} bytes, but one sequence needs {slot} for its state and {block} "
                "for a block of keys and values: raise memory_fraction or cache_bytes, or lower step_tokens"
            )
        share = MAX_STATE_SHARE if block else 1.0
        slots = settings.max_sequences
        if slot:
            slots = max(1, min(slots, int(budget * share) // slot))
        blocks = 0
        if block:
            # No more than all sequences at their longest could use.
            most = slots * -(-max_context // settings.block_size)
            blocks = min(most, (budget - slots * slot) // block)
        return cls(slots, blocks, settings.block_size, slot, block)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens whose keys and values fit; None without attention layers, where any number does."""
        return self.blocks * self.block_size if self.block_bytes else None


class Memory:
    """The slots and blocks of one cache, and the bytes of host memory for sequences put aside."""

    def __init__(self, sizes: MemorySizes, *, swap_bytes: int) -> None:
        self.sizes = sizes
        self.slots, self.blocks = Pool(sizes.slots), Pool(sizes.blocks)
        self.swap_free = swap_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence fill."""
        return -(-tokens // self.sizes.block_size) if self.sizes.block_bytes else 0

    def saved_bytes(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens in host memory."""
        return self.sizes.slot_bytes + self.blocks_for(tokens) * self.sizes.block_bytes
