"""Packed training batches with random access: ``stream.batch(i)`` is a pure function of `i`.

The documents of a corpus, shuffled anew in each epoch, form one endless stream. It is cut into rows of
`context_length` tokens and the rows into batches, so that every token occurs exactly once per epoch and
nothing is padded or dropped. Every row and every document starts a new sequence at position 0: the state
resets there and attention stays inside.

Random access instead of an iterator with a state: a resumed run asks for the next index and gets the same
batches, and several processes take turns (`index * world + rank`) without a word between them. Orders come
from a hash, not from a library's generator, whose numbers may change with its version.

Passkey rows can be mixed in by their share of the tokens. They are whole rows, since a row boundary would cut
the needle off from its question. Left out: sorting by length, weights per source, padding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.data.passkey import Filler, PasskeyTask
from hrwkv.data.tokens import TokenStore
from hrwkv.layers.batch import TokenBatch

IGNORED_LABEL = -100
# The share of passkey rows is counted in whole parts of this, so that their places are exact integers.
SHARE_PARTS = 1 << 16
GOLDEN_RATIO = 0.6180339887498949

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PasskeyMix:
    """Passkey rows for a stream: the task and its share of the rows, 0 to 1."""

    task: PasskeyTask
    share: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"passkey share is {self.share}, expected 0 to 1")

    def rows_before(self, row: int) -> int:
        """Return how many of the rows 0 to row - 1 are passkey rows: an exact share, evenly spread."""
        return row * round(self.share * SHARE_PARTS) // SHARE_PARTS

    def is_passkey(self, row: int) -> bool:
        """Return whether row `row` is a passkey row."""
        return self.rows_before(row + 1) > self.rows_before(row)

    def row(self, row: int, *, filler: Filler, length: int, seed: int) -> Int64:
        """Return the ids [length] int64 of a passkey row, the same for the same arguments."""
        document = self.task.document(filler, length=length, seed=mix_bits(seed, row))
        return np.asarray(document, dtype=np.int64)


class PackedStream:
    """Endless packed batches of `batch_tokens // context_length` rows from a token store.

    store: documents that end with their end-of-text token. seed: orders, and what passkey rows say.

    Raises ValueError when the store is empty or a batch does not hold one row.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        context_length: int,
        batch_tokens: int,
        seed: int,
        passkey: PasskeyMix | None = None,
    ) -> None:
        if context_length < 1 or batch_tokens < context_length:
            raise ValueError(
                f"a batch of {batch_tokens} tokens holds no row of {context_length}: "
                "raise batch_tokens or lower context_length"
            )
        if not len(store.tokens):
            raise ValueError("the token store is empty: give more text")
        self.passkey = passkey if passkey is not None and passkey.share > 0 else None
        if self.passkey is not None:
            self.passkey.task.check_length(context_length)
        self.store, self.seed = store, seed
        self.context_length, self.rows = context_length, batch_tokens // context_length
        self._order: tuple[int, Int64, Int64] | None = None

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch, T."""
        return self.rows * self.context_length

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Return token ids [T] int64 and their sequences, on the CPU; the same for the same `index` >= 0."""
        if index < 0:
            raise ValueError(f"batch index is {index}, expected >= 0")
        first, mix = index * self.rows, self.passkey
        is_text = [mix is None or not mix.is_passkey(row) for row in range(first, first + self.rows)]
        text_rows = np.flatnonzero(is_text)
        start = (first - (mix.rows_before(first) if mix else 0)) * self.context_length
        text, ends = self._text(start, start + len(text_rows) * self.context_length)
        ids = np.empty((self.rows, self.context_length), dtype=np.int64)
        ids[text_rows] = text.reshape(-1, self.context_length)
        if mix is not None:
            filler, length = self.store.tokens, self.context_length
            for row in np.flatnonzero(np.logical_not(is_text)):
                ids[row] = mix.row(first + int(row), filler=filler, length=length, seed=self.seed)
        return torch.from_numpy(ids).flatten(), TokenBatch.from_lengths(self._lengths(ends, text_rows))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every batch is as near as the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go to."""

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, TokenBatch]]:
        """Yield batch(start), batch(start + 1), ... without end."""
        while True:
            yield self.batch(start)
            start += 1

    def _lengths(self, ends: Int64, text_rows: Int64) -> list[int]:
        """Return the sequence lengths: rows, cut where documents end. ends: positions in the batch's text."""
        row, column = np.divmod(ends, self.context_length)
        inside = column > 0  # a document that ends with its row adds no cut
        cuts = text_rows[row[inside]] * self.context_length + column[inside]
        edges = np.arange(self.rows + 1, dtype=np.int64) * self.context_length
        lengths: list[int] = np.diff(np.sort(np.concatenate([edges, cuts]))).tolist()
        return lengths

    def _text(self, start: int, stop: int) -> tuple[Int64, Int64]:
        """Return the stream's tokens `start` to `stop` and where documents end, counted from `start`."""
        per_epoch = len(self.store.tokens)
        tokens, ends = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        position = start
        while position < stop:
            epoch, offset = divmod(position, per_epoch)
            count = min(stop - position, per_epoch - offset)
            part, part_ends = self._epoch_text(epoch, offset, offset + count)
            tokens.append(part)
            ends.append(part_ends + (position - start))
            position += count
        return np.concatenate(tokens), np.concatenate(ends)

    def _epoch_text(self, epoch: int, start: int, stop: int) -> tuple[Int64, Int64]:
        """Return tokens `start` to `stop` of one epoch's order, and the document ends among them."""
        order, ends = self._epoch_order(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        documents, document_ends = order[first : last + 1], ends[first : last + 1]
        document_starts = document_ends - (self.store.offsets[documents + 1] - self.store.offsets[documents])
        begin, end = np.maximum(document_starts, start), np.minimum(document_ends, stop)
        # A token's place in the store is its place in the epoch plus a shift that each document has.
        shift = self.store.offsets[documents] - document_starts
        places = np.arange(start, stop, dtype=np.int64) + np.repeat(shift, end - begin)
        return self.store.tokens[places].astype(np.int64), document_ends[document_ends <= stop] - start

    def _epoch_order(self, epoch: int) -> tuple[Int64, Int64]:
        """Return the epoch's order of documents [M] and their ends [M] in it; the last one is kept."""
        if self._order is None or self._order[0] != epoch:
            keys = hash_bits(np.arange(len(self.store), dtype=np.uint64), salt=mix_bits(self.seed, epoch))
            order = np.argsort(keys, kind="stable").astype(np.int64)
            self._order = (epoch, order, np.cumsum(np.diff(self.store.offsets)[order]))
        return self._order[1], self._order[2]


def next_token_labels(token_ids: Tensor, batch: TokenBatch) -> Tensor:
    """Return labels [T] int64: the next token of the same sequence, -100 for the last token of each.

    token_ids: [T] int64, packed as `batch` says.
    """
    following = F.pad(token_ids, (0, 1))
    following.index_fill_(0, batch.cu_seqlens.long(), IGNORED_LABEL)  # where a sequence begins, another ends
    return following[1:]


def spread_stride(rows: int) -> int:
    """Return a stride prime to `rows` and near their golden section.

    Row i * stride mod rows visits every row once, and any number of successive ones lie evenly apart.
    """
    stride = max(round(rows * GOLDEN_RATIO), 1)
    while math.gcd(stride, rows) > 1:
        stride += 1
    return stride


def mix_bits(seed: int, number: int) -> int:
    """Return 64 well-mixed bits of two integers."""
    first = hash_bits(np.array([seed % (1 << 64)], dtype=np.uint64), salt=0)
    return int(hash_bits(np.array([number % (1 << 64)], dtype=np.uint64), salt=int(first[0]))[0])


def hash_bits(values: npt.NDArray[np.uint64], *, salt: int) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood 2014), the same on every machine for ever."""
    x = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
