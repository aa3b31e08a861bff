"""The text of a run: tokenised once or streamed, packed for each stage as the stage wants it.

Kept apart from the trainer, so that a caller with several runs on one text (a demo, a sweep) reads it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from hrwkv.data.cache import cached_store, tokenizer_fingerprint
from hrwkv.data.documents import Document, Split, read_documents, sample_documents, source_fingerprint
from hrwkv.data.mixing import MixedRows, Rows, Schedule
from hrwkv.data.packing import PackedStream, PasskeyMix, spread_stride
from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.prefetch import Prefetch
from hrwkv.data.records import is_sharded, open_shards
from hrwkv.data.streaming import DocumentStream, StreamedRows, TokenStream
from hrwkv.data.tokens import (
    Encoder,
    TokenStore,
    chat_renderer,
    encode_documents,
    tokenize_documents,
)
from hrwkv.layers.batch import TokenBatch
from hrwkv.settings import DataSettings, DistillSettings


class SpreadRows:
    """Rows that come from all over an epoch, as random access as the stream behind them.

    ``PackedStream`` shuffles documents, but a long document fills many rows: steps in succession would see
    one text, and distillation with so few steps is worse for it. Row i of an epoch of n rows is the stream's
    row ``i * stride mod n``; the stride is prime to n and near the golden section, which keeps any number of
    successive rows evenly apart.
    """

    def __init__(
        self, store: TokenStore, *, context_length: int, seed: int, passkey: PasskeyMix | None
    ) -> None:
        self.stream = PackedStream(
            store, context_length=context_length, batch_tokens=context_length, seed=seed, passkey=passkey
        )
        self.rows = max(len(store.tokens) // context_length, 1)
        self.stride = spread_stride(self.rows)

    def row(self, index: int) -> int:
        """The stream's row at place ``index``."""
        epoch, place = divmod(index, self.rows)
        return epoch * self.rows + place * self.stride % self.rows

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Token ids [context_length] int64 of one row and its sequences, on the CPU."""
        return self.stream.batch(self.row(index))

    def state_dict(self) -> dict[str, Any]:
        """The stream's."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where the stream was."""
        self.stream.load_state_dict(state)


@dataclass(frozen=True)
class Part:
    """One text of the mixture: its weight, what is trained on (a store or a stream) and what is held out."""

    weight: float
    train: TokenStore | TokenStream
    dev: TokenStore


@dataclass(frozen=True)
class Corpus:
    """The texts of a run, and the passkey rows that are mixed into training."""

    parts: tuple[Part, ...]
    passkey: PasskeyMix | None

    @property
    def dev(self) -> TokenStore:
        """The held-out text of the part with the largest weight: filler for what is not of the mixture."""
        return max(self.parts, key=lambda part: part.weight).dev

    def stream(self, settings: DistillSettings, stage: int, *, pin: bool = False) -> Prefetch:
        """Training batches of a stage, made ahead; stages see the rows in different orders.

        pin: in page-locked memory, for a GPU. The caller closes it.
        """
        context_length, seed = settings.context_length(stage), settings.data.seed + stage
        sources: list[Rows] = []
        for part in self.parts:
            if isinstance(part.train, TokenStore):
                rows: Rows = SpreadRows(
                    part.train, context_length=context_length, seed=seed, passkey=self.passkey
                )
            else:
                rows = StreamedRows(
                    part.train,
                    context_length=context_length,
                    block_rows=settings.data.shuffle_rows,
                    seed=seed,
                    passkey=self.passkey,
                )
            sources.append(rows)
        mixed = self._mixed(sources, settings.batch_tokens(stage) // context_length)
        return Prefetch(mixed, depth=settings.data.prefetch, pin=pin)

    def validation_batches(self, settings: DistillSettings, stage: int) -> list[tuple[Tensor, TokenBatch]]:
        """Batches from all over the dev split: at least one, and no text twice."""
        context_length, size = settings.context_length(stage), settings.batch_tokens(stage)
        sources = [
            SpreadRows(part.dev, context_length=context_length, seed=settings.data.seed, passkey=None)
            for part in self.parts
        ]
        rows = self._mixed(sources, size // context_length)
        available = [len(part.dev.tokens) // context_length for part in self.parts]
        count = rows.batches_within(available, most=settings.validation_tokens // size)
        return [rows.batch(index) for index in range(max(count, 1))]

    def _mixed(self, sources: list[Rows] | list[SpreadRows], rows_per_batch: int) -> MixedRows:
        schedule = Schedule([part.weight for part in self.parts])
        return MixedRows(sources, schedule, rows_per_batch=rows_per_batch)


def open_tokenizer(model_path: Path) -> Any:
    """The tokenizer of a model directory. Raises ValueError if there is none that opens."""
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model_path} has no tokenizer that Transformers can open: {reason}") from error


def read_corpus(model_path: Path, settings: DataSettings) -> Corpus:
    """Tokenise the train and dev splits with a model directory's tokenizer, or prepare to as they are needed.

    Raises ValueError for a directory without a tokenizer and for text that cannot be read.
    """
    tokenizer = open_tokenizer(model_path)
    read = _stream_part if settings.tokenise == "stream" else _ahead_part
    parts = tuple(read(sources, weight, settings, tokenizer) for sources, weight in settings.mixture())
    share = settings.passkey_share
    return Corpus(parts, PasskeyMix(PasskeyTask(tokenizer), share) if share > 0 else None)


def _ahead_part(sources: tuple[str, ...], weight: float, settings: DataSettings, tokenizer: Any) -> Part:
    train, dev = (_store(sources, split, settings, tokenizer) for split in ("train", "dev"))
    return Part(weight, train, dev)


def _store(sources: tuple[str, ...], split: Split, settings: DataSettings, tokenizer: Any) -> TokenStore:
    limit = settings.max_bytes if split == "train" else 0

    def documents() -> Iterable[Document]:
        found = read_documents(
            sources,
            split=split,
            render=chat_renderer(tokenizer),
            max_corrupt_share=settings.max_corrupt_share,
        )
        return sample_documents(found, max_bytes=limit) if limit else found

    if not settings.cache:
        return tokenize_documents(documents(), tokenizer, workers=settings.workers)
    key = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sources": [source_fingerprint(source) for source in sources],
        "split": split,
        "max_bytes": limit,
        "max_corrupt_share": settings.max_corrupt_share,
    }
    return cached_store(
        Path(settings.cache),
        key,
        lambda: encode_documents(documents(), tokenizer, workers=settings.workers),
    )


def _stream_part(sources: tuple[str, ...], weight: float, settings: DataSettings, tokenizer: Any) -> Part:
    (source,) = sources
    if not is_sharded(source) or Path(source).is_dir():
        raise ValueError(
            f"text source {source!r} cannot be streamed: give .jsonl or .parquet files, a pattern such as "
            "folder/*.txt, a URL or hf:org/name, or use data.tokenise = 'ahead'"
        )
    shards = open_shards(source, render=chat_renderer(tokenizer))
    share = settings.max_corrupt_share
    held_out = _up_to(settings.dev_bytes, DocumentStream(shards, "dev", share).once())
    dev = tokenize_documents(held_out, tokenizer, workers=settings.workers)
    train = TokenStream(DocumentStream(shards, "train", share), Encoder(tokenizer), settings.workers)
    return Part(weight, train, dev)


def _up_to(max_bytes: int, documents: Iterator[Document]) -> Iterator[Document]:
    """The first documents, until they have `max_bytes`; at least one."""
    for document in documents:
        yield document
        max_bytes -= len(document.text.encode())
        if max_bytes <= 0:
            return
