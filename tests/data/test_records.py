"""Every format gives the same records, from any number on; what cannot be read is named and counted."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrwkv.data.documents import read_documents
from hrwkv.data.records import Ledger, Record, is_sharded, open_shards

TEXTS = [f"text {i} caf\u00e9\n" * (i % 3 + 1) for i in range(23)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts).encode()


def parquet(path: Path, columns: dict[str, list]) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One source a format, each with TEXTS in its first shard."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.jsonl").write_bytes(lines(TEXTS))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    parquet(folder / "c.parquet", {"id": list(range(23)), "text": TEXTS})
    (folder / "hub").mkdir()
    parquet(folder / "hub" / "train-0.parquet", {"text": TEXTS})
    return {
        "jsonl": str(folder / "a.jsonl"),
        "gzip": str(folder / "*.gz"),
        "parquet": str(folder / "c.parquet"),
        "url": f"file://{folder}/a.jsonl",
        "hub": f"hf:{folder / 'hub'}@train",
    }


@pytest.mark.parametrize("kind", ["jsonl", "gzip", "parquet", "url", "hub"])
def test_every_format_gives_the_same_records_from_any_number_on(sources: dict[str, str], kind: str) -> None:
    assert is_sharded(sources[kind])
    shards = open_shards(sources[kind], render=None)
    assert len(shards.names) == 1
    for start in (0, 1, 4, 5, 11, 22, 23):
        found = list(shards.read(0, start))
        assert [record.text for record in found] == TEXTS[start:]
        assert [record.number for record in found] == list(range(start, 23))
        assert [record.key for record in found] == TEXTS[start:]


def test_a_pattern_is_its_files_by_name_and_a_real_name_wins(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text(f"in {name}")
    shards = open_shards(str(tmp_path / "?.txt"), render=None)
    assert [next(shards.read(index, 0)).text for index in range(2)] == ["in a.txt", "in b.txt"]
    assert list(shards.read(0, 1)) == []
    assert not is_sharded(str(tmp_path / "c[1].txt"))


def test_chat_is_rendered_and_text_wins(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    rows = [{"messages": chat}, {"text": "plain", "messages": chat}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet(tmp_path / "b.parquet", {"messages": [chat]})

    def render(messages: list) -> str:
        return "|".join(f"{one['role']}:{one['content']}" for one in messages)

    for name, texts in (("a.jsonl", ["user:hello|assistant:well", "plain"]), ("b.parquet", None)):
        shards = open_shards(str(tmp_path / name), render=render)
        assert [record.text for record in shards.read(0, 0)] == (texts or ["user:hello|assistant:well"])
    without = next(open_shards(str(tmp_path / "a.jsonl"), render=None).read(0, 0))
    assert "line 1 holds chat messages, and the teacher has no chat template" in without.fault


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": \n', "a.jsonl line 2 is not JSON"),
        (b'{"text": "\xe9"}\n', "a.jsonl is not UTF-8: byte 0xe9 at offset 32"),
        (b'{"body": 1}\n', "a.jsonl line 2 has no text"),
        (b'{"messages": [{"from": "human"}]}\n', "a.jsonl line 2 has messages of another form"),
        (b'{"text": "\\udfff"}\n', "a.jsonl line 2 holds half a surrogate pair"),
    ],
)
def test_a_corrupt_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}' + b"    \n" + line + b'{"text": "third"}\n')
    records = list(open_shards(str(path), render=None).read(0, 0))
    assert [record.text for record in records] == ["first", "", "third"]
    assert fault in records[1].fault


def test_a_broken_file_ends_with_a_fault_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-12])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.parquet"):
        *good, last = open_shards(str(tmp_path / name), render=None).read(0, 0)
        assert [record.text for record in good] == TEXTS[: len(good)]
        assert last.ends_shard
        assert f"{name} cannot be read from record {len(good) + 1} on" in last.fault


def test_a_table_without_text_names_the_columns_that_it_has(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"id": [1], "body": ["x"]})
    (record,) = open_shards(str(tmp_path / "a.parquet"), render=None).read(0, 0)
    assert record.ends_shard
    assert "a.parquet cannot be read from record 1 on: it has no column text or messages, only id, body" in (
        record.fault
    )


def test_a_file_that_vanishes_is_an_error_and_no_corruption(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    shards = open_shards(str(tmp_path / "a.jsonl"), render=None)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        list(shards.read(0, 0))


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*absent.parquet' names no file"):
        open_shards(str(tmp_path / "absent.parquet"), render=None)
    with pytest.raises(ValueError, match="text source 'nonsense://a.jsonl' cannot be opened: .*nonsense"):
        open_shards("nonsense://a.jsonl", render=None)
    with pytest.raises(ValueError, match="text source 'hf:.*' cannot be opened by datasets: ") as caught:
        open_shards(f"hf:{tmp_path / 'nowhere'}", render=None)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for module in ("datasets", "pyarrow", "pyarrow.parquet", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.parquet", "b.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    for source, message in (
        (str(tmp_path / "a.parquet"), r"parquet files need pyarrow.*pip install 'hrwkv\[train\]'"),
        (str(tmp_path / "b.jsonl.zst"), r"\.zst files need zstandard.*pip install 'zstandard'"),
        ("hf:org/name", r"Hugging Face data sets need datasets.*pip install 'hrwkv\[train\]'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_shards(source, render=None)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([0.0, 0.05, 0.2, 0.5]))
def test_the_share_decides_and_the_good_ones_remain(tmp_path: Path, good: list[bool], share: float) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}"}}\n' if one else "broken\n" for i, one in enumerate(good)))
    expected = [f"t{i}" for i, one in enumerate(good) if one]

    def read() -> list[str]:
        return [d.text for d in read_documents([path], split="all", max_corrupt_share=share)]

    bad = good.count(False)
    if bad > share * len(good):
        with pytest.raises(ValueError, match=r"\d+ of \d+ records .* are corrupt.*line \d+ is not"):
            read()
    elif expected:
        assert read() == expected


def test_faults_are_logged_by_name_and_the_first_few_are_in_the_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ledger = Ledger("source", max_share=0.01, num_shards=300)
    with caplog.at_level(logging.WARNING, logger="hrwkv.data.records"):
        for number in range(10):
            ledger.add(Record("f.jsonl", number, fault=f"f.jsonl line {number + 1} is bad"))
    assert "skipped: f.jsonl line 7 is bad" in caplog.text
    with pytest.raises(ValueError, match="11 of 11 records and 0 of 300 files") as caught:
        ledger.add(Record("f.jsonl", 10, fault="f.jsonl line 11 is bad"))
    assert [f"line {n} is bad" in str(caught.value) for n in (1, 5, 6)] == [True, True, False]


def test_broken_files_count_against_the_files() -> None:
    ledger = Ledger("source", max_share=0.5, num_shards=3)
    broken = Record("f", 0, fault="f cannot be read", ends_shard=True)
    ledger.add(broken)
    with pytest.raises(ValueError, match="2 of 3 files are corrupt"):
        ledger.add(broken)


def test_a_ledger_goes_on_from_its_state() -> None:
    records = [Record("f", n, fault="" if n % 4 else f"fault {n}") for n in range(20)]
    whole, first = (Ledger("s", max_share=0.9, num_shards=1) for _ in range(2))
    for record in records:
        whole.add(record)
    for record in records[:9]:
        first.add(record)
    second = Ledger("s", max_share=0.9, num_shards=1, state=json.loads(json.dumps(first.state())))
    for record in records[9:]:
        second.add(record)
    assert second.state() == whole.state()
