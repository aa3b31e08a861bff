"""What a model is measured on, and what the demo does besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import check_batch, require


@dataclass(frozen=True)
class EvalSettings:
    """What a model is measured on."""

    text: tuple[str, ...] = ("stdlib",)
    """Text files, folders, .jsonl files, or ``stdlib``: the sources of the running Python. Chat messages are
    read through the model's chat template."""
    split: Literal["train", "dev", "test", "all"] = "test"
    """Part of the text; choose settings on dev, report on test."""
    tokens: int = 65536
    """Tokens that are scored, at most all of the split."""
    context_length: int = 1024
    """Tokens of a row; no context is longer."""
    batch_tokens: int = 4096
    """Tokens of one forward."""
    passkey_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Prompt lengths of the passkey grid, in tokens."""
    passkey_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the key in the prompt, 0 (start) to 1 (end)."""
    passkey_samples: int = 4
    """Prompts per cell of the grid; 0 leaves retrieval out."""
    seed: int = 0
    """Choice of rows and passkeys."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the weights are held in; the scores are always computed in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no measurement can have."""
        require(len(self.text) > 0, "text", self.text, "at least one text source")
        check_batch(self.context_length, self.batch_tokens, where="eval")
        require(self.tokens >= 2, "tokens", self.tokens, "at least 2")
        require(self.passkey_samples >= 0, "passkey_samples", self.passkey_samples, "at least 0")
        inside = all(0 <= depth <= 1 for depth in self.passkey_depths)
        require(inside, "passkey_depths", self.passkey_depths, "numbers from 0 to 1")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does besides converting, distilling and evaluating one student."""

    pure_tokens: int = 250_000
    """Stage 2 tokens of the second student, without any attention layer; 0 leaves it out."""
    prompt: str = (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
        "    def push(self, item):\n        self."
    )
    """Text that teacher and student complete at the end."""
    completion_tokens: int = 48
    """Tokens of each completion."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no demo can have."""
        require(self.pure_tokens >= 0, "pure_tokens", self.pure_tokens, "at least 0")
        require(self.completion_tokens >= 1, "completion_tokens", self.completion_tokens, "at least 1")
