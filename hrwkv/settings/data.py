"""What text a distillation reads, and how it is packed."""

from __future__ import annotations

from dataclasses import dataclass

from hrwkv.settings.checks import check_batch, require


@dataclass(frozen=True)
class DataSettings:
    """What text a distillation reads and how it is packed."""

    sources: tuple[str, ...] = ("stdlib",)
    """Text files, folders, .jsonl files, or ``stdlib``: the sources of the running Python."""
    max_bytes: int = 0
    """Bytes of training text that are read at most, spread over all documents; 0 reads everything."""
    passkey_share: float = 0.0
    """Share of the tokens that are generated passkey documents, 0 to 1."""
    context_length: int = 512
    """Tokens of a row; no sequence is longer."""
    batch_tokens: int = 1024
    """Tokens of a step over all processes, a multiple of context_length."""
    seed: int = 0
    """Order of the rows and choice of the passkeys."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        require(len(self.sources) > 0, "data.sources", self.sources, "at least one text source")
        require(self.max_bytes >= 0, "data.max_bytes", self.max_bytes, "at least 0")
        require(0 <= self.passkey_share <= 1, "data.passkey_share", self.passkey_share, "0 to 1")
        check_batch(self.context_length, self.batch_tokens, where="data")
