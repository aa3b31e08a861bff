"""The files give the store that memory would, only whole folders are used, and nothing half-written stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrwkv.data.cache import cached_store, tokenizer_fingerprint
from hrwkv.data.documents import Document, source_fingerprint
from hrwkv.data.packing import PackedStream
from hrwkv.data.tokens import encode_documents, tokenize_documents

DOCUMENTS = [Document(str(i), f"{i} words " * (i % 9 + 1)) for i in range(40)]


def build(tokenizer: Any, *, calls: list[int] | None = None) -> Any:
    def batches() -> Any:
        if calls is not None:
            calls.append(1)
        return encode_documents(DOCUMENTS, tokenizer, batch_characters=100)

    return batches


def test_files_hold_the_store_of_the_documents(tmp_path: Path, tokenizer: Any) -> None:
    memory, calls = tokenize_documents(DOCUMENTS, tokenizer), []
    for _ in range(2):
        store = cached_store(tmp_path / "cache", {"text": 1}, build(tokenizer, calls=calls))
        assert np.array_equal(store.tokens, memory.tokens)
        assert np.array_equal(store.offsets, memory.offsets)
        assert store.num_bytes == memory.num_bytes
        assert store.tokens.dtype == np.int32
        assert isinstance(store.tokens.base, np.memmap)
    assert len(calls) == 1
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    assert np.array_equal(np.fromfile(file, dtype=np.uint32), memory.tokens)
    rows = [PackedStream(one, context_length=20, batch_tokens=60, seed=1) for one in (store, memory)]
    assert all(np.array_equal(rows[0].batch(i)[0], rows[1].batch(i)[0]) for i in range(9))


def test_another_key_is_another_folder(tmp_path: Path, tokenizer: Any) -> None:
    calls: list[int] = []
    for key in ({"split": "train"}, {"split": "dev"}, {"split": "train"}):
        cached_store(tmp_path, key, build(tokenizer, calls=calls))
    assert len(calls) == 2


def test_an_error_while_tokenising_leaves_no_folder_and_the_next_try_works(
    tmp_path: Path, tokenizer: Any
) -> None:
    def fails() -> Any:
        yield from list(build(tokenizer)())[:2]
        raise ValueError("a.jsonl: too many corrupt records")

    with pytest.raises(ValueError, match="too many corrupt records"):
        cached_store(tmp_path, {}, fails)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(cached_store(tmp_path, {}, build(tokenizer))) == len(DOCUMENTS)


def test_what_a_killed_run_left_is_written_anew(tmp_path: Path, tokenizer: Any) -> None:
    cached_store(tmp_path, {}, build(tokenizer))
    (whole,) = (path for path in tmp_path.iterdir() if path.is_dir())
    half = whole.with_name(f".{whole.name}.partial")
    whole.rename(half)
    (half / "tokens.bin").write_bytes(b"half")
    assert len(cached_store(tmp_path, {}, build(tokenizer))) == len(DOCUMENTS)
    assert not half.exists()


def test_a_damaged_folder_is_named(tmp_path: Path, tokenizer: Any) -> None:
    cached_store(tmp_path, {}, build(tokenizer))
    (file,) = tmp_path.glob("*/tokens.bin")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"holds \d+ tokens, expected \d+: remove the folder"):
        cached_store(tmp_path, {}, build(tokenizer))
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read .* remove the folder"):
        cached_store(tmp_path, {}, build(tokenizer))


def test_reading_never_changes_the_files(tmp_path: Path, tokenizer: Any) -> None:
    store = cached_store(tmp_path, {}, build(tokenizer))
    (file,) = tmp_path.glob("*/tokens.bin")
    before = file.read_bytes()
    store.tokens[:] = 7
    assert file.read_bytes() == before


def test_fingerprints_tell_tokenizers_and_sources_apart(
    tmp_path: Path, tokenizer: Any, merging_tokenizer: Any
) -> None:
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(merging_tokenizer)
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"text": "x"}')
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), str(tmp_path), "stdlib"]
    before = [source_fingerprint(source) for source in sources]
    assert [source_fingerprint(source) for source in sources] == before
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text('{"text": "xyz"}')
    after = [source_fingerprint(source) for source in sources]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True, True, True, False]
