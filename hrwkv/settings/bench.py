"""What an engine is measured at."""

from __future__ import annotations

from dataclasses import dataclass

from hrwkv.settings.checks import require


@dataclass(frozen=True)
class BenchSettings:
    """Batches and lengths to measure; what does not fit is told in its row."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Sequences that decode together; empty measures no decoding."""
    context: int = 512
    """Tokens of each of them before it decodes."""
    steps: int = 64
    """Decode steps to measure over."""
    prompt_lengths: tuple[int, ...] = (512, 4096)
    """Tokens of the prompts to read; empty measures no reading."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no measurement can have."""
        require(
            all(size >= 1 for size in self.batch_sizes), "batch_sizes", self.batch_sizes, "1 or more each"
        )
        require(self.context >= 1, "context", self.context, "at least 1 token")
        require(self.steps >= 2, "steps", self.steps, "at least 2")
        lengths = self.prompt_lengths
        require(all(length >= 1 for length in lengths), "prompt_lengths", lengths, "1 or more each")
        require(bool(self.batch_sizes or lengths), "batch_sizes", self.batch_sizes, "some, or prompt_lengths")
