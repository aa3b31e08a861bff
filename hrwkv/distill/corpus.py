"""The text of a run: tokenised once, packed for each stage as the stage wants it.

Kept apart from the trainer, so that a caller with several runs on one text (a demo, a sweep) reads it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from hrwkv.data.documents import read_documents
from hrwkv.data.packing import PackedStream, PasskeyMix
from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.tokens import TokenStore, tokenize_documents
from hrwkv.layers.batch import TokenBatch
from hrwkv.settings import DataSettings, DistillSettings


@dataclass(frozen=True)
class Corpus:
    """Tokenised text of a run, and the passkey rows that are mixed into training."""

    train: TokenStore
    dev: TokenStore
    passkey: PasskeyMix | None

    def stream(self, settings: DistillSettings, stage: int) -> PackedStream:
        """Training batches of a stage; stages see the documents in different orders."""
        return PackedStream(
            self.train,
            context_length=settings.context_length(stage),
            batch_tokens=settings.batch_tokens(stage),
            seed=settings.data.seed + stage,
            passkey=self.passkey,
        )

    def validation_batches(self, settings: DistillSettings, stage: int) -> list[tuple[Tensor, TokenBatch]]:
        """The first batches of the dev split: at least one, and no text twice."""
        size = settings.batch_tokens(stage)
        stream = PackedStream(
            self.dev,
            context_length=settings.context_length(stage),
            batch_tokens=size,
            seed=settings.data.seed,
        )
        count = min(settings.validation_tokens // size, len(self.dev.tokens) // size)
        return [stream.batch(index) for index in range(max(count, 1))]


def read_corpus(model_path: Path, settings: DataSettings) -> Corpus:
    """Tokenise the train and dev splits with a model directory's tokenizer.

    Raises ValueError for a directory without a tokenizer and for text that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model_path} has no tokenizer that Transformers can open: {reason}") from error
    stores = [
        tokenize_documents(read_documents(settings.sources, split=split), tokenizer)
        for split in ("train", "dev")
    ]
    share = settings.passkey_share
    passkey = PasskeyMix(PasskeyTask(tokenizer), share) if share > 0 else None
    return Corpus(stores[0], stores[1], passkey)
