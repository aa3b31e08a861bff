"""The checks that several settings share; each ends in one ValueError that names the setting."""

from __future__ import annotations


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise the ValueError that every bad setting ends in."""
    if not condition:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def check_batch(context_length: int, batch_tokens: int, *, where: str) -> None:
    """Raise ValueError unless a batch is a positive whole number of rows."""
    require(context_length >= 2, f"{where}.context_length", context_length, "at least 2 tokens")
    whole = batch_tokens >= context_length and batch_tokens % context_length == 0
    require(whole, f"{where}.batch_tokens", batch_tokens, f"a multiple of context_length {context_length}")
