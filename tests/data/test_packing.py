"""Packing against the plain statement of it: the epochs' documents in their order, cut every C tokens."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.data.packing import IGNORED_LABEL, PackedStream, PasskeyMix, next_token_labels
from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.tokens import TokenStore
from hrwkv.layers.batch import TokenBatch

# A token names its document and its place in it, so that a packed token tells where it comes from.
STEP = 1000
ORDER_OF_SEED_7 = [[3, 7, 0, 8, 1, 5, 6, 2, 9, 4], [4, 2, 7, 9, 1, 5, 8, 6, 3, 0]]

lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)
contexts = st.integers(1, 17)


def make_store(lengths: list[int]) -> TokenStore:
    return TokenStore.from_documents([np.arange(n) + STEP * i for i, n in enumerate(lengths)])


def read(stream: PackedStream, count: int) -> tuple[list[int], list[list[int]]]:
    """Return all tokens, and the tokens of each sequence, of the first `count` batches."""
    tokens: list[int] = []
    sequences: list[list[int]] = []
    for i in range(count):
        ids, batch = stream.batch(i)
        assert ids.dtype == torch.int64
        assert len(ids) == sum(batch.lengths) == stream.batch_tokens
        tokens += ids.tolist()
        sequences += [part.tolist() for part in ids.split(list(batch.lengths))]
    return tokens, sequences


@settings(deadline=None, max_examples=80)
@given(lengths_of_documents, contexts, st.integers(1, 4), st.integers(0, 2**70), st.integers(1, 4))
def test_every_token_occurs_once_per_epoch_and_in_order_within_its_document(
    lengths, context, rows, seed, epochs
):
    store = make_store(lengths)
    stream = PackedStream(store, context_length=context, batch_tokens=context * rows, seed=seed)
    total = len(store.tokens)
    count = -(-epochs * total // stream.batch_tokens)
    tokens, _ = read(stream, count)
    for epoch in range(epochs):
        part = tokens[epoch * total : (epoch + 1) * total]
        assert sorted(part) == sorted(store.tokens.tolist())
        order = list(dict.fromkeys(token // STEP for token in part))
        assert part == [token for document in order for token in store.document(document).tolist()]


@settings(deadline=None, max_examples=80)
@given(lengths_of_documents, contexts, st.integers(1, 4), st.integers(0, 99))
def test_sequences_are_exactly_the_stream_cut_at_rows_and_documents(lengths, context, rows, seed):
    store = make_store(lengths)
    stream = PackedStream(store, context_length=context, batch_tokens=context * rows, seed=seed)
    count = -(-2 * len(store.tokens) // stream.batch_tokens)
    tokens, sequences = read(stream, count)
    expected: list[list[int]] = []
    for place, token in enumerate(tokens):
        if place % context == 0 or token % STEP == 0:
            expected.append([])
        expected[-1].append(token)
    assert sequences == expected


def test_positions_restart_where_a_sequence_starts():
    stream = PackedStream(make_store([5, 3, 9]), context_length=4, batch_tokens=11, seed=1)
    ids, batch = stream.batch(1)
    assert stream.rows == 2
    assert len(ids) == 8
    assert batch.positions.tolist() == [p for length in batch.lengths for p in range(length)]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.lengths]).tolist()


def equal(one: tuple[torch.Tensor, TokenBatch], other: tuple[torch.Tensor, TokenBatch]) -> bool:
    return torch.equal(one[0], other[0]) and one[1].lengths == other[1].lengths


@settings(deadline=None, max_examples=40)
@given(lengths_of_documents, contexts, st.permutations(range(6)), st.integers(0, 2**40))
def test_a_batch_depends_on_its_index_only(lengths, context, order, far):
    def stream() -> PackedStream:
        return PackedStream(make_store(lengths), context_length=context, batch_tokens=3 * context, seed=5)

    one, other = stream(), stream()
    in_order = [one.batch(i) for i in range(6)]
    for i in order:
        other.batch(far)
        assert equal(in_order[i], other.batch(i))
    resumed = stream().batches(4)
    assert all(equal(in_order[i], next(resumed)) for i in (4, 5))


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["text", "passkey"])
def test_two_ranks_with_half_batches_see_the_whole_batch(tokenizer, share):
    store = make_store([50, 7, 31, 90])

    def stream(rows: int) -> PackedStream:
        mix = PasskeyMix(PasskeyTask(tokenizer), share)
        return PackedStream(store, context_length=200, batch_tokens=200 * rows, seed=2, passkey=mix)

    whole, half = stream(4), stream(2)
    for i in range(5):
        ids, batch = whole.batch(i)
        ranks = [half.batch(2 * i + rank) for rank in range(2)]
        assert torch.equal(ids, torch.cat([part for part, _ in ranks]))
        assert batch.lengths == ranks[0][1].lengths + ranks[1][1].lengths


def test_epochs_and_seeds_differ_in_order():
    store = make_store([3] * 30)

    def order(seed: int, epoch: int) -> list[int]:
        stream = PackedStream(store, context_length=90, batch_tokens=90, seed=seed)
        return (stream.batch(epoch)[0][::3] // STEP).tolist()

    orders = [tuple(order(seed, epoch)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert all(sorted(one) == list(range(30)) for one in orders)


def test_the_order_is_the_same_on_every_machine():
    """The numbers were computed once: a resumed run on another library version must not see other batches."""
    stream = PackedStream(make_store([1] * 10), context_length=10, batch_tokens=10, seed=7)
    assert (stream.batch(0)[0] // STEP).tolist() == ORDER_OF_SEED_7[0]
    assert (stream.batch(1)[0] // STEP).tolist() == ORDER_OF_SEED_7[1]


def test_a_uniform_shuffle_puts_every_document_first_equally_often():
    store = make_store([1] * 5)
    stream = PackedStream(store, context_length=5, batch_tokens=5, seed=3)
    firsts = Counter(int(stream.batch(i)[0][0]) // STEP for i in range(1000))
    assert all(150 < firsts[document] < 250 for document in range(5))  # 200 expected, deviation 13


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_passkey_rows_have_their_share_and_the_text_loses_nothing(tokenizer, share):
    store, task = make_store([130, 40, 7, 211]), PasskeyTask(tokenizer)
    context, rows = 150, 3
    mixed = PackedStream(
        store, context_length=context, batch_tokens=context * rows, seed=2, passkey=PasskeyMix(task, share)
    )
    plain = PackedStream(store, context_length=context, batch_tokens=context, seed=2)
    text_rows = passkey_rows = 0
    for i in range(40):
        ids, batch = mixed.batch(i)
        edges = set(batch.cu_seqlens.tolist())
        for row, part in enumerate(ids.view(rows, context)):
            start, stop = row * context, (row + 1) * context
            inside = {edge - start for edge in edges if start < edge < stop}
            if "What is the pass key?" in tokenizer.decode([t for t in part.tolist() if t < len(tokenizer)]):
                passkey_rows += 1
                assert not inside  # needle and question stay in one sequence
                continue
            expected, expected_batch = plain.batch(text_rows)
            assert torch.equal(part, expected)
            assert inside == set(expected_batch.cu_seqlens.tolist()) - {0, context}
            text_rows += 1
    assert abs(passkey_rows - share * 120) <= 1
    assert passkey_rows + text_rows == 120


def test_passkey_rows_differ_from_one_another(tokenizer):
    stream = PackedStream(
        make_store([300]),
        context_length=150,
        batch_tokens=150,
        seed=2,
        passkey=PasskeyMix(PasskeyTask(tokenizer), 1),
    )
    rows = [tuple(stream.batch(i)[0].tolist()) for i in range(20)]
    assert len(set(rows)) == 20


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), max_size=9))
def test_labels_are_the_next_token_inside_each_sequence(lengths):
    ids = torch.arange(sum(lengths)) + 100
    labels = next_token_labels(ids, TokenBatch.from_lengths(lengths))
    expected = (
        [part[1:].tolist() + [IGNORED_LABEL] for part in ids.split(lengths) if len(part)] if lengths else []
    )
    assert labels.tolist() == sum(expected, [])
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("store", "change", "message"),
    [
        (
            [4, 4],
            {"batch_tokens": 7},
            "a batch of 7 tokens holds no row of 8: raise batch_tokens or lower context",
        ),
        ([4, 4], {"context_length": 0}, "a batch of 16 tokens holds no row of 0"),
        ([], {}, "the token store is empty"),
    ],
    ids=["batch-too-small", "no-context", "no-documents"],
)
def test_bad_arguments_are_refused(store, change, message):
    arguments = {"context_length": 8, "batch_tokens": 16, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        PackedStream(make_store(store), **arguments)


def test_bad_index_and_bad_passkey_mix_are_refused(tokenizer):
    task = PasskeyTask(tokenizer)
    with pytest.raises(ValueError, match="batch index is -1, expected >= 0"):
        PackedStream(make_store([4]), context_length=8, batch_tokens=8, seed=0).batch(-1)
    with pytest.raises(ValueError, match="passkey share is 1.5, expected 0 to 1"):
        PasskeyMix(task, 1.5)
    with pytest.raises(ValueError, match="passkey documents of 16 tokens are too short"):
        PackedStream(
            make_store([40]), context_length=16, batch_tokens=16, seed=0, passkey=PasskeyMix(task, 0.1)
        )
