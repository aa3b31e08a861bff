"""How the engine uses the machine: devices and numbers, memory, batches, the waiting line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import require


@dataclass(frozen=True)
class EngineSettings:
    """Everything about an engine that is not in the model's directory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers of weights, keys and values; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the RWKV state between two tokens; bfloat16 halves its traffic, rounds at every token and
    needs a GPU."""
    max_sequences: int = 256
    """Sequences that run at once; fewer if their states leave too little room for keys and values."""
    max_context: int | None = None
    """Tokens of prompt and answer together; left out, the model's max_position_embeddings."""
    step_tokens: int = 2048
    """Tokens of one forward: every running sequence's next one, the rest goes to prompts."""
    block_size: int = 64
    """Tokens of a block of keys and values."""
    memory_fraction: float = 0.9
    """Part of a GPU's memory that weights, caches and one forward may take together."""
    cache_bytes: int | None = None
    """Bytes of states, keys and values; left out, what --memory-fraction leaves, or 1 GiB without a GPU."""
    swap_bytes: int = 4 * 2**30
    """Host memory for sequences that were put aside; one that finds no room there is computed again."""
    prefix_cache_bytes: int | None = None
    """Host memory for prompts and answers that later requests may continue; left out, a quarter of what is
    free, at most 8 GiB beside a GPU, where each GiB takes a second at the start, and 1 GiB without one. 0
    keeps nothing."""
    max_waiting: int = 4096
    """Requests that may wait for their first step; one more is refused."""
    cuda_graphs: Literal["startup", "lazy", "off"] = "lazy"
    """When the decode step of a batch size is recorded on a GPU: all at the start, each when it first comes,
    or never."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Prepare a step while the one before it still runs; ``auto`` does so on a GPU. An answer that ends at a
    token costs one step more of its sequence."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no engine can have."""
        choices = {
            "device": ("auto", "cpu", "cuda"),
            "dtype": ("auto", "float32", "bfloat16"),
            "state_dtype": ("float32", "bfloat16"),
            "cuda_graphs": ("startup", "lazy", "off"),
            "overlap": ("auto", "on", "off"),
        }
        for name, allowed in choices.items():
            require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")
        for name in ("max_sequences", "block_size", "max_waiting"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        enough = self.step_tokens >= self.max_sequences
        expected = f"at least max_sequences {self.max_sequences}, a token for each"
        require(enough, "step_tokens", self.step_tokens, expected)
        context = self.max_context
        require(context is None or context >= 2, "max_context", context, "at least 2, or left out")
        fraction = self.memory_fraction
        require(0 < fraction <= 1, "memory_fraction", fraction, "more than 0 and at most 1")
        size = self.cache_bytes
        require(size is None or size > 0, "cache_bytes", size, "more than 0, or left out")
        require(self.swap_bytes >= 0, "swap_bytes", self.swap_bytes, "at least 0")
        size = self.prefix_cache_bytes
        require(size is None or size >= 0, "prefix_cache_bytes", size, "at least 0, or left out")
