"""Streamed rows against the plain statement of it: a split's documents end to end, cut every C tokens."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.data.documents import split_of
from hrwkv.data.packing import PasskeyMix
from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.records import Record, open_shards
from hrwkv.data.streaming import DocumentStream, StreamedRows, TokenStream
from hrwkv.data.tokens import Encoder

TEXTS = [f"document {i} " * (i * 7 % 5 + 1) for i in range(60)]
END = 0


class MemoryShards:
    """Shards of texts in memory that count what is read; None is a corrupt record."""

    def __init__(self, shards: list[list[str | None]]) -> None:
        self.source, self.shards, self.reads = "memory", shards, 0
        self.names = [f"shard{index}" for index in range(len(shards))]

    def read(self, index: int, start: int) -> Any:
        for number in range(start, len(self.shards[index])):
            self.reads += 1
            text = self.shards[index][number]
            fault = "" if text else f"shard{index} line {number + 1} is bad"
            yield Record(self.names[index], number, text=text or "", key=text or "", fault=fault)


class Letters:
    """An encoder of one token a character, and the end token."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([*map(ord, text), END], dtype=np.int32) for text in texts]


def spread(texts: list[str | None], count: int) -> MemoryShards:
    return MemoryShards([texts[index::count] for index in range(count)])


def stream(shards: Any, *, workers: int = 1, share: float = 0.9, encoder: Any = None) -> TokenStream:
    documents = DocumentStream(shards, "train", share)
    return TokenStream(documents, encoder or Letters(), workers)


def rows(shards: Any, *, context: int = 7, block: int = 4, seed: int = 0, workers: int = 1) -> StreamedRows:
    source = stream(shards, workers=workers)
    return StreamedRows(source, context_length=context, block_rows=block, seed=seed)


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and one[1].lengths == other[1].lengths


def train_texts() -> list[str]:
    return [text for text in TEXTS if split_of(text) == "train"]


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(5, 40), st.integers(1, 9), st.integers(0, 99))
def test_rows_are_the_documents_end_to_end(shards: int, context: int, block: int, seed: int) -> None:
    source = rows(spread(TEXTS, shards), context=context, block=block, seed=seed)
    count = -(-2 * sum(len(text) + 1 for text in train_texts()) // context)
    count += -count % block
    in_place: list[tuple[list[int], list[int]]] = [([], [])] * count
    for index in range(count):
        ids, batch = source.batch(index)
        at = index // block * block + index % block * source.stride % block
        in_place[at] = (ids.tolist(), list(batch.lengths))
    tokens = [token for ids, _ in in_place for token in ids]
    text = "".join(map(chr, tokens)).split(chr(END))
    size = len(train_texts())
    for epoch in range(2):
        assert sorted(text[epoch * size : (epoch + 1) * size]) == sorted(train_texts())
    ends = {place + 1 for place, token in enumerate(tokens) if token == END}
    cuts = np.cumsum([length for _, lengths in in_place for length in lengths])
    assert set(cuts.tolist()) == {c for c in ends if c <= len(tokens)} | set(
        range(context, len(tokens) + 1, context)
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 60),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 13),
    st.lists(st.integers(0, 59), max_size=6),
)
def test_a_resume_anywhere_goes_on_token_for_token(
    cut: int, shards: int, block: int, context: int, bad: list[int]
) -> None:
    texts = [None if index in bad else text for index, text in enumerate(TEXTS)]

    def new() -> StreamedRows:
        return rows(spread(texts, shards), context=context, block=block, seed=3)

    undisturbed, first, resumed = new(), new(), new()
    expected = [undisturbed.batch(index) for index in range(cut + 12)]
    for index in range(cut):
        first.batch(index)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(equal(resumed.batch(index), expected[index]) for index in range(cut, cut + 12))
    assert resumed.state_dict() == undisturbed.state_dict()


def test_a_bookmark_saves_reading_the_shards_before_it() -> None:
    shards = MemoryShards([[f"{shard} {number}" for number in range(200)] for shard in range(5)])
    first, resumed = rows(shards), rows(shards)
    for index in range(700):
        first.batch(index)
    shards.reads = 0
    resumed.load_state_dict(first.state_dict())
    resumed.batch(700)
    assert 0 < shards.reads <= 64 + 5


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(14)))
def test_a_row_depends_on_its_index_only(order: list[int]) -> None:
    one, other = rows(spread(TEXTS, 3)), rows(spread(TEXTS, 3))
    expected = [one.batch(index) for index in range(14)]
    assert all(equal(other.batch(index), expected[index]) for index in order)


@pytest.mark.parametrize("workers", [2, 5])
def test_n_workers_give_the_rows_of_one(tmp_path: Path, tokenizer: Any, workers: int) -> None:
    lines = [json.dumps({"text": f"{text} {n}"}) for n in range(8) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def new(count: int) -> StreamedRows:
        shards = open_shards(str(tmp_path / "*.jsonl"), render=None)
        source = stream(shards, workers=count, encoder=Encoder(tokenizer))
        return StreamedRows(source, context_length=50, block_rows=5, seed=1)

    one, many = new(1), new(workers)
    assert all(equal(one.batch(index), many.batch(index)) for index in range(200))
    assert one.state_dict() == many.state_dict()


def test_epochs_and_seeds_take_the_shards_in_other_orders() -> None:
    shards = MemoryShards([[f"shard {index}"] for index in range(40)])

    def order(seed: int, epochs: int) -> list[str]:
        size = sum(split_of(text) == "train" for (text,) in shards.shards)
        read = DocumentStream(shards, "train", 0.0).read(None, seed=seed)
        return [next(read)[0].text for _ in range(size * epochs)]

    first, second = np.array_split(order(0, 2), 2)
    assert Counter(first.tolist()) == Counter(second.tolist())
    assert first.tolist() != second.tolist()
    assert first.tolist() != order(1, 1)
    assert first.tolist() == order(0, 1)


def test_splits_of_a_stream_are_disjoint_and_complete() -> None:
    texts = [f"text {index}" for index in range(400)]
    parts = [
        [document.text for document in DocumentStream(spread(texts, 3), split, 0.0).once()]
        for split in ("train", "dev", "test")
    ]
    assert all(parts)
    assert sorted(sum(parts, [])) == sorted(texts)


def test_too_much_corruption_ends_the_stream_each_time_it_is_asked() -> None:
    texts = [None if index % 10 == 3 else text for index, text in enumerate(TEXTS)]
    source = StreamedRows(stream(spread(texts, 2), share=0.05), context_length=500, block_rows=99, seed=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"6 of 60 records .* 0.05.*shard1 line 2 is bad"):
            source.batch(0)


def test_a_split_without_a_document_is_an_error_and_no_endless_search() -> None:
    dev = next(text for text in (f"text {index}" for index in range(999)) if split_of(text) == "dev")
    with pytest.raises(ValueError, match="the train split of memory is empty: give more text, or"):
        rows(MemoryShards([[dev]])).batch(0)
    with pytest.raises(ValueError, match="the test split of memory is empty: give more text, or"):
        list(DocumentStream(MemoryShards([[dev]]), "test", 0.0).once())


def test_passkey_rows_come_by_their_share_and_are_text_with_a_needle(tokenizer: Any) -> None:
    def new(passkey: PasskeyMix | None) -> StreamedRows:
        source = stream(spread([text * 9 for text in TEXTS], 2), encoder=Encoder(tokenizer))
        return StreamedRows(source, context_length=200, block_rows=4, seed=1, passkey=passkey)

    mix = PasskeyMix(PasskeyTask(tokenizer), 0.25)
    plain, mixed = new(None), new(mix)
    for index in range(16):
        ids, batch = mixed.batch(index)
        if index % 4 == 3:
            assert "The pass key is" in tokenizer.decode(ids)
            assert batch.lengths == (200,)
        else:
            assert equal((ids, batch), plain.batch(index))
    with pytest.raises(ValueError, match="passkey documents of 20 tokens are too short"):
        StreamedRows(plain.stream, context_length=20, block_rows=4, seed=1, passkey=mix)
