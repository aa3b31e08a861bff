import json
import logging
import sysconfig
from pathlib import Path

import pytest

from hrwkv.data.documents import Document, read_documents, sample_documents, split_of

SPLITS = ("train", "dev", "test")


def write_folder(folder: Path, count: int) -> Path:
    for i in range(count):
        path = folder / f"part{i % 3}" / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of file {i}\n")
    return folder


def names(sources: list, split: str) -> list[str]:
    return [document.name for document in read_documents(sources, split=split)]


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("argparse.py", "train"),  # sha256 / 2^256 = 0.7861
        ("asyncio/tasks.py", "train"),  # 0.1465
        ("fileinput.py", "dev"),
        ("pickle.py", "dev"),
        ("shutil.py", "test"),
        ("gzip.py", "test"),
    ],
)
def test_split_of_a_name_never_changes(key: str, split: str):
    assert split_of(key) == split


def test_shares_are_95_and_two_and_a_half_percent():
    found = [split_of(f"name {i}") for i in range(20_000)]
    assert found.count("train") / 20_000 == pytest.approx(0.95, abs=0.005)
    assert found.count("dev") / 20_000 == pytest.approx(0.025, abs=0.0035)


def test_splits_of_a_folder_are_disjoint_and_complete(tmp_path: Path):
    folder = write_folder(tmp_path, 300)
    parts = [names([folder], split) for split in SPLITS]
    assert all(parts)
    assert sorted(sum(parts, [])) == names([folder], "all")
    assert len(names([folder], "all")) == len(set(names([folder], "all"))) == 300


def test_a_file_keeps_its_split_when_the_folder_grows(tmp_path: Path):
    write_folder(tmp_path, 300)
    before = {split: set(names([tmp_path], split)) for split in SPLITS}
    write_folder(tmp_path, 400)
    for split in SPLITS:
        assert before[split] == {n for n in names([tmp_path], split) if int(n[10:-3]) < 300}


def test_the_split_hashes_the_name_inside_the_folder_not_the_folder(tmp_path: Path):
    first, second = write_folder(tmp_path / "first", 300), write_folder(tmp_path / "second", 300)
    assert [names([first], split) for split in SPLITS] == [names([second], split) for split in SPLITS]


def test_few_documents_are_cut_by_position_and_lose_nothing(tmp_path: Path):
    texts = {f"file{i}.txt": "".join(f"{i} line {n}\n" for n in range(400 + i)) for i in range(3)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    parts = [{d.name: d.text for d in read_documents([tmp_path], split=split)} for split in SPLITS]
    for name, text in texts.items():
        pieces = [part[name] for part in parts]
        assert "".join(pieces) == text
        assert all(piece.endswith("\n") for piece in pieces)
        assert [len(piece) / len(text) for piece in pieces] == pytest.approx([0.95, 0.025, 0.025], abs=0.004)


def test_one_long_line_is_cut_inside(tmp_path: Path):
    (tmp_path / "line.txt").write_text("x" * 1000)
    sizes = [len(next(read_documents([tmp_path / "line.txt"], split=s)).text) for s in SPLITS]
    assert sizes == [950, 25, 25]


def test_jsonl_is_split_by_text(tmp_path: Path):
    lines = [json.dumps({"text": f"document {i}", "id": i}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n\n".join(reversed(lines)) + "\n")
    for split in SPLITS:
        here = [d.text for d in read_documents([tmp_path / "a.jsonl"], split=split)]
        there = [d.text for d in read_documents([tmp_path / "b.jsonl"], split=split)]
        assert here == there[::-1]
        assert here
        assert all(split_of(text) == split for text in here)


def test_stdlib_is_the_running_python_without_installed_packages():
    root = Path(sysconfig.get_path("stdlib"))
    documents = {d.name: d.text for d in read_documents(["stdlib"], split="all")}
    assert documents["argparse.py"] == (root / "argparse.py").read_text(encoding="utf-8")
    assert all(name.endswith(".py") for name in documents)
    assert not [n for n in documents if "site-packages" in n or "__pycache__" in n or "_sysconfigdata" in n]
    assert "shutil.py" in names(["stdlib"], "test")
    assert "pickle.py" in names(["stdlib"], "dev")


def test_folder_skips_what_is_not_text_and_counts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    for skipped in ("__pycache__", ".hidden", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "other.py").write_text("y = 2\n")
    with caplog.at_level(logging.INFO, logger="hrwkv.data.documents"):
        documents = list(read_documents([tmp_path], split="all"))
    assert documents == [Document("good.py", "x = 1\n"), Document("mark.txt", "with a mark\n")]
    assert "2 documents, 1 files skipped" in caplog.text


def test_suffixes_choose_the_files_of_a_folder_but_not_named_ones(tmp_path: Path):
    for name in ("a.py", "b.txt", "c.odd"):
        (tmp_path / name).write_text(name)
    documents = read_documents([tmp_path, tmp_path / "c.odd"], split="all", suffixes=(".py",))
    assert [d.name for d in documents] == ["a.py", "c.odd"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty \(0 bytes\)"),
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"),
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            r"latin\.jsonl is not UTF-8: byte 0xe9 at offset 24",
        ),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', r"broken\.jsonl line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', r"other\.jsonl line 1 has no text"),
        ("list.jsonl", b'["a"]\n', r"list\.jsonl line 1 has no text"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', r"half\.jsonl line 1 holds half a surrogate pair"),
        ("blank.jsonl", b"\n\n", r"blank\.jsonl is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(("txt", "jsonl")) else "",
)
def test_bad_file_is_named_with_its_fault(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents([tmp_path / name], split="train"))


def test_missing_source_is_refused_before_anything_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.txt' does not exist: expected a text file"):
        read_documents(["stdlib", tmp_path / "absent.txt"], split="train")


def test_no_source_no_text_and_unknown_split_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no text source was given"):
        read_documents([], split="train")
    with pytest.raises(ValueError, match="split is 'valid', expected one of train, dev, test, all"):
        read_documents(["stdlib"], split="valid")
    with pytest.raises(ValueError, match=r"holds no UTF-8 text file .*\.txt"):
        list(read_documents([tmp_path], split="all"))
    (tmp_path / "tiny.txt").write_text("ab")
    with pytest.raises(ValueError, match="the dev split of .* is empty"):
        list(read_documents([tmp_path / "tiny.txt"], split="dev"))


def test_sample_fits_the_limit_and_ignores_the_order_of_its_input():
    documents = [Document(f"name{i}", "\u00e9" * (i % 7 + 1)) for i in range(100)]  # 2 to 14 bytes
    sample = sample_documents(documents, max_bytes=101)
    assert 101 - 2 < sum(len(d.text.encode()) for d in sample) <= 101
    assert sample == sample_documents(documents[::-1], max_bytes=101)
    assert sample != documents[: len(sample)]
    assert {d.name for d in sample} <= {d.name for d in sample_documents(documents, max_bytes=10**6)}
    with pytest.raises(ValueError, match="no document has at most 1 bytes"):
        sample_documents(documents, max_bytes=1)
