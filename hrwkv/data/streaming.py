"""Text too large to tokenise ahead: documents read, tokenised and packed as the steps need them.

A position is (epoch, place in the epoch's order of shards, record), as JSON; documents from a position on are
a function of it. ``StreamedRows`` makes rows of them in blocks and spreads each block's rows, so a batch is
still a function of its index: a bookmark only saves reading everything before it again.

Order: shards are shuffled in each epoch, records keep theirs, rows are spread over a block. That is less
shuffling than a store's; sources whose neighbours are alike want larger blocks or more shards.
Left out: cutting few documents by position, a limit of bytes: both need the whole source.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hrwkv.data.documents import Document, split_of
from hrwkv.data.packing import PasskeyMix, hash_bits, mix_bits, spread_stride
from hrwkv.data.records import Ledger, Shards
from hrwkv.data.tokens import Encoder, in_order
from hrwkv.layers.batch import TokenBatch

logger = logging.getLogger(__name__)

# Documents of one call of the tokenizer; each worker has up to two calls waiting.
DOCUMENTS_PER_CALL = 64

Position = dict[str, Any]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentStream:
    """The documents of a split of a sharded source, from any position on."""

    shards: Shards
    split: str
    max_corrupt_share: float

    def read(self, position: Position | None, *, seed: int) -> Iterator[tuple[Document, Position]]:
        """Yield documents without end, each with the position after it; None starts at the beginning.

        seed: the order of shards. Raises ValueError for an epoch with no document or with too many corrupt
        records.
        """
        at = position or _epoch_start(0)
        while True:
            for document, after in self._epoch(at, seed):
                at = after
                yield document, after
            self._check_found(at["found"])
            at = _epoch_start(at["epoch"] + 1)

    def once(self) -> Iterator[Document]:
        """Yield the documents of one epoch, shards in the order of their names; raises as ``read`` does."""
        found = 0
        for document, after in self._epoch(_epoch_start(0), seed=None):
            found = after["found"]
            yield document
        self._check_found(found)

    def _check_found(self, found: int) -> None:
        if not found:
            raise ValueError(
                f"the {self.split} split of {self.shards.source} is empty: give more text, or "
                "data.tokenise = 'ahead', which cuts a few documents"
            )

    def _epoch(self, at: Position, seed: int | None) -> Iterator[tuple[Document, Position]]:
        names = self.shards.names
        order = np.arange(len(names))
        if seed is not None:
            order = np.argsort(
                hash_bits(order.astype(np.uint64), salt=mix_bits(seed, at["epoch"])), kind="stable"
            )
        ledger = Ledger(
            self.shards.source,
            max_share=self.max_corrupt_share,
            num_shards=len(names),
            state=at["ledger"],
        )
        record_number, found = at["record"], at["found"]
        for place in range(at["place"], len(names)):
            for record in self.shards.read(int(order[place]), record_number):
                ledger.add(record)
                if not record.text or split_of(record.key) != self.split:
                    continue
                found += 1
                after = {
                    "epoch": at["epoch"],
                    "place": place,
                    "record": record.number + 1,
                    "found": found,
                    "ledger": ledger.state(),
                }
                yield Document(record.name, record.text), after
            record_number = 0
        ledger.finish()


@dataclass(frozen=True)
class TokenStream:
    """A document stream, tokenised by `workers` threads ahead of the reader, in order."""

    documents: DocumentStream
    encoder: Encoder
    workers: int = 1

    def read(
        self, position: Position | None, *, seed: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], Position]]:
        """Yield token ids [n] int32 of each document, and the position after it."""
        calls = _calls(self.documents.read(position, seed=seed))
        for encoded in in_order(self._encode, calls, workers=self.workers):
            yield from encoded

    def _encode(self, call: list[tuple[Document, Position]]) -> list[tuple[npt.NDArray[np.int32], Position]]:
        arrays = self.encoder.encode([document.text for document, _ in call])
        return [(array, position) for array, (_, position) in zip(arrays, call, strict=True)]


class StreamedRows:
    """Rows of `context_length` tokens from a token stream; ``batch(i)`` is row i, the same for the same `i`.

    Text rows are the documents end to end, cut every `context_length` tokens, no token left out; in each
    block of `block_rows` they come spread. A passkey row is a text row with needle and questions among it,
    whose last tokens make room for them.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        context_length: int,
        block_rows: int,
        seed: int,
        passkey: PasskeyMix | None = None,
    ) -> None:
        if passkey is not None and passkey.share > 0:
            passkey.task.check_length(context_length)
        self.stream, self.context_length, self.seed = stream, context_length, seed
        self.block_rows, self.passkey, self.stride = block_rows, passkey, spread_stride(block_rows)
        self.load_state_dict({"block": 0, "position": None, "used": 0})

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Return token ids [context_length] int64 and their sequences, on the CPU."""
        block, place = divmod(index, self.block_rows)
        if block < self._bookmark["block"]:
            logger.info("%s: read again from its start", self.stream.documents.shards.source)
            self.load_state_dict({"block": 0, "position": None, "used": 0})
        while self._filled is None or self._bookmark["block"] < block:
            self._fill()
        tokens, ends = self._filled
        start = place * self.stride % self.block_rows * self.context_length
        row = tokens[start : start + self.context_length]
        if self.passkey is not None and self.passkey.is_passkey(index):
            row = self.passkey.row(index, filler=row, length=self.context_length, seed=self.seed)
            return torch.from_numpy(row), TokenBatch.from_lengths([self.context_length])
        inside = ends[(ends > start) & (ends < start + self.context_length)] - start
        lengths = np.diff(inside, prepend=0, append=self.context_length)
        return torch.from_numpy(row.copy()), TokenBatch.from_lengths(lengths.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return where the block of the last row starts: block, position of a document, tokens used of it."""
        return dict(self._bookmark)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read on from a bookmark."""
        self._bookmark = dict(state)
        self._next_bookmark = dict(state)
        self._filled: tuple[Int64, Int64] | None = None
        # Of the first document that is read, what was used already is left out.
        self._skip, self._used = state["used"], 0
        self._rest = np.zeros(0, dtype=np.int32)
        self._before = self._after = state["position"]
        self._documents = self.stream.read(state["position"], seed=self.seed)

    def _fill(self) -> None:
        """Make the next block: tokens [block_rows * context_length] int64, and where documents end in it."""
        self._bookmark, self._filled = self._next_bookmark, None
        parts: list[npt.NDArray[np.int32]] = []
        ends, have = [], 0
        need = self.block_rows * self.context_length
        try:
            while have < need:
                part = self._take(need - have)
                parts.append(part)
                have += len(part)
                if not len(self._rest):
                    ends.append(have)
        except BaseException:
            self.load_state_dict(self._bookmark)  # asked again, it fails again: nothing is left half read
            raise
        self._filled = np.concatenate(parts).astype(np.int64), np.array(ends, dtype=np.int64)
        done = not len(self._rest)
        self._next_bookmark = {
            "block": self._bookmark["block"] + 1,
            "position": self._after if done else self._before,
            "used": 0 if done else self._used,
        }

    def _take(self, count: int) -> npt.NDArray[np.int32]:
        """Return up to `count` tokens of one document, of the next one where the last is used up."""
        if not len(self._rest):
            self._before = self._after
            document, self._after = next(self._documents)
            self._rest, self._used, self._skip = document[self._skip :], self._skip, 0
        part, self._rest = self._rest[:count], self._rest[count:]
        self._used += len(part)
        return part


def _epoch_start(epoch: int) -> Position:
    return {"epoch": epoch, "place": 0, "record": 0, "found": 0, "ledger": None}


def _calls(items: Iterator[tuple[Document, Position]]) -> Iterator[list[tuple[Document, Position]]]:
    while call := list(islice(items, DOCUMENTS_PER_CALL)):
        yield call
