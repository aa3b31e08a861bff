"""``TokenStore``: a tokenised corpus, all documents end to end in one array.

One flat array and the places where documents end are all that packing needs: a document is found by a binary
search, a batch is gathered in one go, and a corpus of 10^9 tokens takes 4 GB. Left out: files of tokens on
disk.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hrwkv.data.documents import Document
from hrwkv.data.passkey import leading_special_ids

logger = logging.getLogger(__name__)

# One call of the tokenizer: enough text to keep its threads busy, little enough to report progress.
BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class TokenStore:
    """Documents end to end: tokens [T] int32, document i is tokens[offsets[i]:offsets[i + 1]].

    offsets: [M+1] int64, from 0 to T.
    num_bytes: UTF-8 bytes of the text, 0 where the store was not made from text.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    num_bytes: int = 0

    @classmethod
    def from_documents(
        cls, documents: Iterable[Sequence[int] | npt.NDArray[Any]], *, num_bytes: int = 0
    ) -> "TokenStore":
        """Join documents of token ids (1-D, each with its end of text already); empty ones are left out."""
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        arrays = [array for array in arrays if len(array)]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        return cls(tokens, offsets, num_bytes)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """Return the token ids of one document, as a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    progress: Callable[[int], None] | None = None,
    batch_characters: int = BATCH_CHARACTERS,
) -> TokenStore:
    """Tokenise `documents` with a Hugging Face tokenizer; each one ends with its end-of-text token.

    A document starts with whatever the tokenizer puts before a text (a BOS token, or nothing). `progress` is
    called after each batch (of about `batch_characters`) with the number of documents that are done.

    Raises ValueError when the tokenizer has no end-of-text token or there is no document.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
    start, end = leading_special_ids(tokenizer), [tokenizer.eos_token_id]
    arrays: list[npt.NDArray[np.int32]] = []
    num_bytes = 0
    for batch in _text_batches(documents, batch_characters):
        # verbose=False: a document longer than the model's context is normal here, packing cuts it.
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        arrays += [np.asarray([*start, *ids, *end], dtype=np.int32) for ids in encoded]
        num_bytes += sum(len(text.encode()) for text in batch)
        if progress is not None:
            progress(len(arrays))
    if not arrays:
        raise ValueError("there is no document to tokenise: check the text sources and the split")
    store = TokenStore.from_documents(arrays, num_bytes=num_bytes)
    logger.info("%d documents, %d bytes, %d tokens", len(store), num_bytes, len(store.tokens))
    return store


def _text_batches(documents: Iterable[Document], batch_characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= batch_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
