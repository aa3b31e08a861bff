"""What text a distillation reads, and how it is packed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import check_batch, require

# No "?" before it: the end of a URL's query is no weight.
WEIGHTED = re.compile(r"([^?]+)=(\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class DataSettings:
    """What text a distillation reads and how it is packed."""

    sources: tuple[str, ...] = ("stdlib",)
    """Text files, folders, ``stdlib`` (the sources of the running Python), .jsonl and .parquet files,
    patterns (``corpus/*.parquet``) and URLs of them, or ``hf:org/name[:config][@split]``. ``source=weight``
    for all of them mixes by weight; without weights they are one text, or equal streams."""
    max_bytes: int = 0
    """Bytes of training text (of each weighted source) that are read at most, spread over all documents; 0
    reads everything."""
    max_corrupt_share: float = 0.001
    """Share of a source's records, and of its files, that may be corrupt: they are logged and skipped."""
    tokenise: Literal["ahead", "stream"] = "ahead"
    """``ahead`` tokenises everything before the first step; ``stream`` as the steps need it, for sources that
    are too large for that: .jsonl, .parquet, patterns, URLs and ``hf:`` only."""
    cache: str = ""
    """Folder for the text tokenised ahead, which is then mapped into memory; empty keeps it in memory."""
    workers: int = 1
    """Threads that tokenise; their number changes no token."""
    prefetch: int = 2
    """Batches that are made ahead of the step; 0 makes each when it is needed."""
    shuffle_rows: int = 256
    """Rows of a stream that are read at once and spread."""
    dev_bytes: int = 1_000_000
    """Bytes of each streamed source's dev split that are kept for validation."""
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
        check_sources(self.sources, name="data.sources")
        require(self.max_bytes >= 0, "data.max_bytes", self.max_bytes, "at least 0")
        share = self.max_corrupt_share
        require(0 <= share < 1, "data.max_corrupt_share", share, "0 to below 1")
        require(self.tokenise in ("ahead", "stream"), "data.tokenise", self.tokenise, "ahead or stream")
        if self.tokenise == "stream":
            require(not self.max_bytes, "data.max_bytes", self.max_bytes, "0 with data.tokenise stream")
            require(not self.cache, "data.cache", self.cache, "no cache with data.tokenise stream")
        for name, least in (("workers", 1), ("prefetch", 0), ("shuffle_rows", 1), ("dev_bytes", 1)):
            require(getattr(self, name) >= least, f"data.{name}", getattr(self, name), f"at least {least}")
        require(0 <= self.passkey_share <= 1, "data.passkey_share", self.passkey_share, "0 to 1")
        check_batch(self.context_length, self.batch_tokens, where="data")

    def mixture(self) -> list[tuple[tuple[str, ...], float]]:
        """Sources that are read as one, and their weight among the others.

        Weighted sources stand alone, a stream too; sources without weights are one corpus.
        """
        return mixture_of(self.sources, joins=self.tokenise == "ahead")


def check_sources(sources: tuple[str, ...], *, name: str) -> None:
    """Raise ValueError unless there is a source, and a weight above 0 for all or for none of them."""
    require(len(sources) > 0, name, sources, "at least one text source")
    weights = [weight for _, weight in map(split_weight, sources) if weight is not None]
    good = len(weights) in (0, len(sources)) and all(0 < weight < math.inf for weight in weights)
    require(good, name, sources, "no weight or a weight above 0 for every source")


def mixture_of(sources: tuple[str, ...], *, joins: bool = True) -> list[tuple[tuple[str, ...], float]]:
    """Sources that are read as one, and their weight; ``joins``: those without weights are one corpus."""
    pairs = [split_weight(source) for source in sources]
    if joins and all(weight is None for _, weight in pairs):
        return [(sources, 1.0)]
    return [((name,), 1.0 if weight is None else weight) for name, weight in pairs]


def split_weight(source: str) -> tuple[str, float | None]:
    """``name=0.3`` as name and weight; a source that ends in no ``=number`` has none."""
    match = WEIGHTED.fullmatch(source)
    return (match[1], float(match[2])) if match else (source, None)
