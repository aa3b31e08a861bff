"""``TokenStore``: a tokenised corpus, all documents end to end in one array.

One flat array and the places where documents end are all that packing needs: a document is found by a binary
search, a batch is gathered in one go, and a corpus of 10^9 tokens takes 4 GB: in memory, or mapped from the
files that ``cache`` writes. Tokenising takes the time, so threads share it (a fast tokenizer lets them run);
their results keep the documents' order, whatever their number.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hrwkv.data.documents import Document
from hrwkv.data.passkey import leading_special_ids
from hrwkv.data.records import Render

logger = logging.getLogger(__name__)

# One call of the tokenizer: enough text to keep its threads busy, little enough to report progress.
BATCH_CHARACTERS = 2_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


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


class Encoder:
    """Texts to documents of token ids: what a tokenizer puts before a text, the text, its end-of-text token.

    May be called from several threads: each gets its own copy of the tokenizer.
    Raises ValueError when the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._local = threading.local()
        self._local.tokenizer = tokenizer
        self._start, self._end = leading_special_ids(tokenizer), [tokenizer.eos_token_id]

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids [n] int32 of each text, start and end included."""
        if not hasattr(self._local, "tokenizer"):
            self._local.tokenizer = copy.deepcopy(self._tokenizer)
        # verbose=False: a document longer than the model's context is normal here, packing cuts it.
        encoded = self._local.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.asarray([*self._start, *ids, *self._end], dtype=np.int32) for ids in encoded]


def chat_renderer(tokenizer: Any) -> Render | None:
    """Return chat messages -> text by the tokenizer's own chat template, None where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    begin = tokenizer.bos_token if leading_special_ids(tokenizer) else None

    def render(messages: list[dict[str, Any]]) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
        # A template that writes the begin token itself would give two: every document gets one already.
        return text.removeprefix(begin) if begin else text

    return render


def in_order(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Yield function(item) in the order of `items`, computed ahead by `workers` threads (1: none, here)."""
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def encode_documents(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    workers: int = 1,
    batch_characters: int = BATCH_CHARACTERS,
) -> Iterator[tuple[list[npt.NDArray[np.int32]], int]]:
    """Yield the ids of some documents at a time and the UTF-8 bytes of their text, in order.

    Raises ValueError when the tokenizer has no end-of-text token or there is no document.
    """
    encoder = Encoder(tokenizer)

    def encode(texts: list[str]) -> tuple[list[npt.NDArray[np.int32]], int]:
        return encoder.encode(texts), sum(len(text.encode()) for text in texts)

    batches = in_order(encode, _text_batches(documents, batch_characters), workers=workers)
    count = 0
    for arrays, num_bytes in batches:
        count += len(arrays)
        yield arrays, num_bytes
    if not count:
        raise ValueError("there is no document to tokenise: check the text sources and the split")


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    progress: Callable[[int], None] | None = None,
    batch_characters: int = BATCH_CHARACTERS,
    workers: int = 1,
) -> TokenStore:
    """Tokenise `documents` with a Hugging Face tokenizer; each one ends with its end-of-text token.

    A document starts with whatever the tokenizer puts before a text (a BOS token, or nothing). `progress` is
    called after each batch (of about `batch_characters`) with the number of documents that are done.

    Raises ValueError when the tokenizer has no end-of-text token or there is no document.
    """
    arrays: list[npt.NDArray[np.int32]] = []
    num_bytes = 0
    for batch, size in encode_documents(
        documents, tokenizer, workers=workers, batch_characters=batch_characters
    ):
        arrays += batch
        num_bytes += size
        if progress is not None:
            progress(len(arrays))
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
