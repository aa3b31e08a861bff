"""Who holds which state slot, KV block and page of host memory: counts only, the tensors are ``HybridCache``
and ``HostPages``.

Full blocks of a prompt are shared by the answers to it, and pages by kept prefixes that begin alike, so both
have reference counts; a block that is still written to has one owner. Left out: blocks that requests share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hrwkv.model.cache import kv_bytes_per_token, state_bytes
from hrwkv.model.config import HybridConfig
from hrwkv.settings import EngineSettings

# Of the cache's bytes: more sequences than this share of states leaves would find no room for their keys.
MAX_STATE_SHARE = 0.5
# Of a page of host memory where no block says how large it is.
PAGE_BYTES = 2**20


class Pool:
    """``total`` numbers from ``first`` on, taken, shared and given back."""

    def __init__(self, total: int, *, first: int = 0) -> None:
        self.total = total
        # There may be millions, so those that nobody has ever had are in no list.
        self._next = first
        self._returned: list[int] = []
        self._owners: dict[int, int] = {}

    @property
    def free(self) -> int:
        """How many can be taken."""
        return self.total - self.used

    @property
    def used(self) -> int:
        """How many have an owner."""
        return len(self._owners)

    def take(self, count: int) -> list[int]:
        """So many free ones in rising order, which have one owner now; there must be enough."""
        assert 0 <= count <= self.free
        again = min(count, len(self._returned))
        taken = sorted(self._returned.pop() for _ in range(again))
        taken += range(self._next, self._next + count - again)
        self._next += count - again
        self._owners |= dict.fromkeys(taken, 1)
        return taken

    def share(self, items: Iterable[int]) -> None:
        """One owner more for each."""
        for item in items:
            self._owners[item] += 1

    def num_unshared(self, items: Iterable[int]) -> int:
        """How many of them have one owner."""
        return sum(self._owners.get(item) == 1 for item in items)

    def release(self, items: Iterable[int]) -> None:
        """One owner less for each; without any it is free."""
        for item in items:
            self._owners[item] -= 1
            if not self._owners[item]:
                del self._owners[item]
                self._returned.append(item)


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

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of host memory: a block of keys and values, or without those a part of a state."""
        return self.block_bytes or min(self.slot_bytes, PAGE_BYTES)

    @property
    def state_pages(self) -> int:
        """Pages that a state fills."""
        return -(-self.slot_bytes // self.page_bytes)


@dataclass(eq=False)
class Saved:
    """A sequence's memory on the host: pages of its state, and one for each of its blocks.

    Several answers to one prompt may start from one copy. is_certain: the step that made it did not fail.
    """

    state: list[int]
    blocks: list[int]
    owners: int = 1
    is_certain: bool = field(default=False, init=False)

    @property
    def pages(self) -> list[int]:
        """All of them."""
        return [*self.state, *self.blocks]


class Memory:
    """The slots and blocks of one cache, and pages of host memory: for sequences put aside (``swap``) and for
    ``kept`` prefixes."""

    def __init__(self, sizes: MemorySizes, *, swap_bytes: int, prefix_bytes: int = 0) -> None:
        self.sizes = sizes
        self.slots, self.blocks = Pool(sizes.slots), Pool(sizes.blocks)
        self.kept = Pool(prefix_bytes // sizes.page_bytes)
        self.swap = Pool(swap_bytes // sizes.page_bytes, first=self.kept.total)

    @property
    def num_pages(self) -> int:
        """Pages of host memory."""
        return self.swap.total + self.kept.total

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence fill."""
        return -(-tokens // self.sizes.block_size) if self.sizes.block_bytes else 0

    def pages_for(self, tokens: int) -> int:
        """Pages of a sequence of so many tokens in host memory."""
        return self.sizes.state_pages + self.blocks_for(tokens)
