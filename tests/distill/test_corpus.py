"""A batch is a function of its index, whatever the sources, their mixture and the way they are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrwkv.data.documents import read_documents, split_of
from hrwkv.data.packing import PackedStream
from hrwkv.data.tokens import TokenStore, tokenize_documents
from hrwkv.distill.corpus import SpreadRows, read_corpus
from hrwkv.settings import DataSettings, DistillSettings

CONTEXT = 8


def stream(num_rows: int) -> SpreadRows:
    """One document whose token at place i is i, so that a row's first token tells the row."""
    store = TokenStore.from_documents([np.arange(num_rows * CONTEXT)])
    return SpreadRows(store, context_length=CONTEXT, seed=0, passkey=None)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 60, 144])
def test_every_row_comes_once_in_each_epoch(num_rows: int) -> None:
    rows = stream(num_rows)
    for epoch in range(2):
        places = range(epoch * num_rows, (epoch + 1) * num_rows)
        assert sorted(rows.row(place) for place in places) == list(places)


def test_successive_rows_are_far_apart() -> None:
    rows = stream(144)
    for start in range(0, 144 - 8):
        eight = sorted(rows.row(place) for place in range(start, start + 8))
        assert min(b - a for a, b in zip(eight, eight[1:], strict=False)) >= 144 // 16


def test_a_row_depends_on_its_index_only() -> None:
    rows = stream(60)
    token_ids, batch = rows.batch(17)
    assert torch.equal(token_ids, torch.arange(CONTEXT) + rows.row(17) * CONTEXT)
    assert batch.lengths == (CONTEXT,)
    rows.batch(40)
    assert torch.equal(rows.batch(17)[0], token_ids)


def settings(*sources: str, **data: Any) -> DistillSettings:
    return DistillSettings(
        data=DataSettings(sources=sources, context_length=16, batch_tokens=64, **data), validation_tokens=512
    )


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one[0], other[0]) and one[1].lengths == other[1].lengths


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two .jsonl files whose texts are letters of one kind, so that a token tells its source."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in "ab":
        lines = [json.dumps({"text": f"{name * (number % 23 + 1)}"}) for number in range(400)]
        # Texts of one letter repeat and share a split; these are all different.
        lines += [json.dumps({"text": name * 24 + f"z{name}" * number}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in "ab"}


def test_unweighted_sources_are_one_text_packed_and_spread(
    directories: tuple[Path, Path, Path], tokenizer: Any, files: dict[str, str]
) -> None:
    """The order of the batches from before mixtures and streams were known."""
    sources = [files["a"], str(directories[2])]
    recipe = settings(*sources)
    batches = read_corpus(directories[1], recipe.data).stream(recipe, 1)
    store = tokenize_documents(read_documents(sources, split="train"), tokenizer)
    rows = PackedStream(store, context_length=16, batch_tokens=16, seed=1)
    place = SpreadRows(store, context_length=16, seed=1, passkey=None).row
    for index in (0, 1, 2, 7, 300):
        expected = [rows.batch(place(4 * index + number)) for number in range(4)]
        token_ids, batch = batches.batch(index)
        assert torch.equal(token_ids, torch.cat([ids for ids, _ in expected]))
        assert batch.lengths == sum((part.lengths for _, part in expected), ())
    batches.close()


@pytest.mark.parametrize("tokenise", ["ahead", "stream"])
def test_weights_are_shares_of_the_rows(
    directories: tuple[Path, Path, Path], tokenizer: Any, files: dict[str, str], tokenise: str
) -> None:
    recipe = settings(f"{files['a']}=0.75", f"{files['b']}=0.25", tokenise=tokenise, shuffle_rows=8)
    batches = read_corpus(directories[1], recipe.data).stream(recipe, 1)
    letter = {tokenizer.encode(name)[0]: name for name in "ab"}
    for index in range(20):
        rows = batches.batch(index)[0].view(4, 16).tolist()
        found = [{letter[token] for token in row if token in letter} for row in rows]
        assert sorted(map(sorted, found)) == [["a"], ["a"], ["a"], ["b"]]
    batches.close()


def test_the_cache_and_workers_change_no_batch(
    directories: tuple[Path, Path, Path], files: dict[str, str], tmp_path: Path
) -> None:
    plain = settings(files["a"], files["b"])
    cached = settings(files["a"], files["b"], cache=str(tmp_path), workers=2, prefetch=0)
    for _ in range(2):
        one, other = (read_corpus(directories[1], recipe.data) for recipe in (plain, cached))
        first, second = one.stream(plain, 2), other.stream(cached, 2)
        assert all(equal(first.batch(index), second.batch(index)) for index in range(9))
        dev = zip(one.validation_batches(plain, 1), other.validation_batches(cached, 1), strict=True)
        assert all(equal(*pair) for pair in dev)
        first.close()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_streamed_mixture_resumes_batch_for_batch(
    directories: tuple[Path, Path, Path], files: dict[str, str], cut: int
) -> None:
    recipe = settings(f"{files['a']}=2", f"{files['b']}=1", tokenise="stream", shuffle_rows=3)
    corpus = read_corpus(directories[1], recipe.data)
    undisturbed, first, resumed = (corpus.stream(recipe, 2) for _ in range(3))
    expected = [undisturbed.batch(index) for index in range(cut + 8)]
    for index in range(cut):
        first.batch(index)
    resumed.batch(0)  # as a run does that checks its first batch before it opens the checkpoint
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(equal(resumed.batch(index), expected[index]) for index in range(cut, cut + 8))
    for one in (undisturbed, first, resumed):
        one.close()


def test_a_stream_holds_out_what_a_store_holds_out(
    directories: tuple[Path, Path, Path], tokenizer: Any, files: dict[str, str]
) -> None:
    stream, ahead = settings(files["a"], tokenise="stream"), settings(files["a"])
    held_out = [read_corpus(directories[1], recipe.data).dev for recipe in (stream, ahead)]
    assert np.array_equal(held_out[0].tokens, held_out[1].tokens)
    texts = [tokenizer.decode(held_out[0].document(i)[:-1]) for i in range(len(held_out[0]))]
    assert {split_of(text) for text in texts} == {"dev"}
    short = settings(files["a"], tokenise="stream", dev_bytes=1)
    assert len(read_corpus(directories[1], short.data).dev) == 1


def test_validation_reads_no_text_twice(directories: tuple[Path, Path, Path], files: dict[str, str]) -> None:
    for recipe in (settings(files["a"]), settings(f"{files['a']}=1", f"{files['b']}=3")):
        corpus = read_corpus(directories[1], recipe.data)
        batches = corpus.validation_batches(recipe, 1)
        rows = [part.dev.tokens[: len(part.dev.tokens) // 16 * 16] for part in corpus.parts]
        seen = sum(len(token_ids) for token_ids, _ in batches)
        assert seen <= max(sum(map(len, rows)), 64)
        if len(corpus.parts) == 1:
            assert len(batches) == max(min(512 // 64, len(corpus.dev.tokens) // 64), 1)


def test_a_folder_cannot_be_streamed(directories: tuple[Path, Path, Path]) -> None:
    for source in (str(directories[2]), "stdlib"):
        with pytest.raises(ValueError, match=r"cannot be streamed: give .jsonl or .parquet files"):
            read_corpus(directories[1], settings(source, tokenise="stream").data)
