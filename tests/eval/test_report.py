import json
from pathlib import Path

import pytest

from hrwkv.eval.memory import Memory
from hrwkv.eval.needle import Grid
from hrwkv.eval.perplexity import Comparison, Scores
from hrwkv.eval.report import Result, percent, size, summary_table, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def scores(first: int, last: int, *, kl: float) -> Scores:
    return Scores(
        first=first, last=last, tokens=100, student_nll=1.1 + kl, teacher_nll=1.1, kl=kl, agreement=1 - kl
    )


COMPARISON = Comparison(
    overall=scores(1, 31, kl=0.2), by_position=(scores(1, 15, kl=0.3), scores(16, 31, kl=0.1))
)
GRID = Grid(lengths=(64, 128, 256), depths=(0.0, 1.0), samples=4, correct=((4, 4), (3, 4), (0, 1)))
KINDS = {"embedding": 5, "head": 0, "rwkv": 0, "attention": 9, "mlp": 7, "norm": 1}
TEACHER = Result(
    "teacher", COMPARISON.of_teacher(), GRID, Memory(22, KINDS, 0, 4, state_bytes=0, kv_bytes_per_token=4096)
)
STUDENT = Result(
    "student | 1",
    COMPARISON,
    GRID,
    Memory(30, {**KINDS, "rwkv": 8}, 3, 1, state_bytes=98304, kv_bytes_per_token=1024),
)
FACTS = {"text": "stdlib, test split", "seed": 3}


def test_json_holds_every_number(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "out", [TEACHER, STUDENT], title="A title", facts=FACTS)
    report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    assert (report["title"], report["facts"]) == ("A title", FACTS)
    student = report["models"][1]
    assert student["comparison"]["ratio"] == pytest.approx(COMPARISON.overall.ratio)
    assert student["comparison"]["by_position"][1]["kl"] == 0.1
    assert student["grid"]["correct"] == [[4, 4], [3, 4], [0, 1]]
    assert student["grid"]["accuracy"] == pytest.approx(16 / 24)
    assert student["memory"]["break_even_context"] == 33
    assert report["models"][0]["comparison"]["overall"]["agreement"] == 1.0


def test_markdown_tables_are_complete(tmp_path: Path) -> None:
    write_report(tmp_path, [TEACHER, STUDENT], title="A title", facts=FACTS)
    lines = (tmp_path / "report.md").read_text().splitlines()
    ratio, perplexity = COMPARISON.overall.ratio, COMPARISON.overall.student_perplexity
    assert (
        f"| student \\| 1 | {perplexity:.3f} | {ratio:.3f} | 0.2000 | 80.0% | 66.7% | 96 KiB | 1 KiB |"
        in lines
    )
    assert "| teacher | 100.0% | 87.5% | 12.5% |" in lines
    assert "| student \\| 1, KL | 0.300 | 0.100 |" in lines
    assert "| student \\| 1 | 3 + 1 | 30 | 5 | 8 | 9 | 7 | 1 | 98,304 B | 1,024 B | 33 tokens |" in lines
    assert "- seed: 3" in lines
    assert "![passkey](passkey.png)" in lines


def test_pictures_are_written_for_what_was_measured(tmp_path: Path) -> None:
    written = write_report(tmp_path / "all", [TEACHER, STUDENT], title="t", facts={})
    assert [path.name for path in written] == ["report.json", "report.md", "passkey.png", "position.png"]
    assert all(path.read_bytes().startswith(PNG) for path in written[2:])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(path.name for path in written)
    written = write_report(tmp_path / "one", [Result("alone", memory=STUDENT.memory)], title="t", facts={})
    assert [path.name for path in written] == ["report.json", "report.md"]


def test_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(tmp_path, [TEACHER], title="t", facts={})
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report(tmp_path, [TEACHER], title="t", facts={"path": tmp_path})
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_missing_numbers_are_a_dash() -> None:
    assert summary_table([Result("empty")])[1] == [["empty", *["-"] * 7]]


def test_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one result"):
        write_report(tmp_path, [], title="t", facts={})


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (135_168, "132 KiB"), (89_653_248, "85.5 MiB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_percent() -> None:
    assert (percent(None), percent(0.9954)) == ("-", "99.5%")
