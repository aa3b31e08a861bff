"""The text of a run: tokenised once, packed for each stage as the stage wants it.

Kept apart from the trainer, so that a caller with several runs on one text (a demo, a sweep) reads it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hrwkv.data.documents import Document, read_documents, sample_documents
from hrwkv.data.packing import PackedStream, PasskeyMix
from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.tokens import TokenStore, tokenize_documents
from hrwkv.layers.batch import TokenBatch
from hrwkv.settings import DataSettings, DistillSettings

GOLDEN_RATIO = 0.6180339887498949


class SpreadRows:
    """Batches whose rows come from all over an epoch, as random access as the stream behind them.

    ``PackedStream`` shuffles documents, but a long document fills many rows: steps in succession would see
    one text, and distillation with so few steps is worse for it. Row i of an epoch of n rows is the stream's
    row ``i * stride mod n``; the stride is prime to n and near the golden section, which keeps any number of
    successive rows evenly apart.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        context_length: int,
        batch_tokens: int,
        seed: int,
        passkey: PasskeyMix | None,
    ) -> None:
        self.rows_per_batch = batch_tokens // context_length
        self.stream = PackedStream(
            store, context_length=context_length, batch_tokens=context_length, seed=seed, passkey=passkey
        )
        self.rows = max(len(store.tokens) // context_length, 1)
        self.stride = max(round(self.rows * GOLDEN_RATIO), 1)
        while math.gcd(self.stride, self.rows) > 1:
            self.stride += 1

    def row(self, index: int) -> int:
        """The stream's row at place ``index``."""
        epoch, place = divmod(index, self.rows)
        return epoch * self.rows + place * self.stride % self.rows

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Token ids [T] int64 and their sequences, on the CPU; the same for the same ``index``."""
        first = index * self.rows_per_batch
        rows = [self.stream.batch(self.row(first + number)) for number in range(self.rows_per_batch)]
        lengths = [length for _, batch in rows for length in batch.lengths]
        return torch.cat([token_ids for token_ids, _ in rows]), TokenBatch.from_lengths(lengths)


@dataclass(frozen=True)
class Corpus:
    """Tokenised text of a run, and the passkey rows that are mixed into training."""

    train: TokenStore
    dev: TokenStore
    passkey: PasskeyMix | None

    def stream(self, settings: DistillSettings, stage: int) -> SpreadRows:
        """Training batches of a stage; stages see the rows in different orders."""
        return SpreadRows(
            self.train,
            context_length=settings.context_length(stage),
            batch_tokens=settings.batch_tokens(stage),
            seed=settings.data.seed + stage,
            passkey=self.passkey,
        )

    def validation_batches(self, settings: DistillSettings, stage: int) -> list[tuple[Tensor, TokenBatch]]:
        """Batches from all over the dev split: at least one, and no text twice."""
        size = settings.batch_tokens(stage)
        stream = SpreadRows(
            self.dev,
            context_length=settings.context_length(stage),
            batch_tokens=size,
            seed=settings.data.seed,
            passkey=None,
        )
        count = min(settings.validation_tokens // size, len(self.dev.tokens) // size)
        return [stream.batch(index) for index in range(max(count, 1))]


def open_tokenizer(model_path: Path) -> Any:
    """The tokenizer of a model directory. Raises ValueError if there is none that opens."""
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model_path} has no tokenizer that Transformers can open: {reason}") from error


def read_corpus(model_path: Path, settings: DataSettings) -> Corpus:
    """Tokenise the train and dev splits with a model directory's tokenizer.

    Raises ValueError for a directory without a tokenizer and for text that cannot be read.
    """
    tokenizer = open_tokenizer(model_path)
    train: Iterable[Document] = read_documents(settings.sources, split="train")
    if settings.max_bytes:
        train = sample_documents(train, max_bytes=settings.max_bytes)
    dev = read_documents(settings.sources, split="dev")
    share = settings.passkey_share
    passkey = PasskeyMix(PasskeyTask(tokenizer), share) if share > 0 else None
    return Corpus(tokenize_documents(train, tokenizer), tokenize_documents(dev, tokenizer), passkey)
