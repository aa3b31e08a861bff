import json

import pytest

from tests.cli.conftest import Files, Run

SMALL = ["--device", "cpu", "--max-sequences", 4, "--step-tokens", 32, "--block-size", 8, "--steps", 4]


def test_tables_say_what_was_measured_and_what_was_not(files: Files, run: Run) -> None:
    done = run(
        "bench", files.student, *SMALL, "--batch-sizes", "2,5", "--context", 16, "--prompt-lengths", "20,999"
    )
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    rows = {tuple(line[:2]): line for line in lines if line and line[0].isdigit()}
    assert [len(rows[key]) for key in (("2", "16"), ("5", "16"))] == [6, 6]
    assert rows["2", "16"][-1].endswith("%")
    assert rows["5", "16"][2:] == ["-"] * 4
    assert ["999", "-", "-", "-", "-"] in lines
    assert "5 sequences of" in done.out
    assert "the prompt has 999 tokens" in done.out


def test_json_has_the_case_and_consistent_numbers(files: Files, run: Run) -> None:
    done = run(
        "bench", files.teacher, *SMALL, "--batch-sizes", 2, "--context", 9, "--prompt-lengths", 30, "--json"
    )
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["engine"]["step_tokens"] == 32
    assert (found["dtype"], found["measurement"]["context"]) == ("float32", 9)
    (decode,), (prefill,) = found["decode"], found["prefill"]
    assert (decode["batch"], decode["context"], prefill["length"]) == (2, 9, 30)
    assert decode["tokens_per_second"] == pytest.approx(2e3 / decode["milliseconds"])
    assert decode["of_floor"] == pytest.approx(decode["floor_milliseconds"] / decode["milliseconds"])
    assert prefill["tokens_per_second"] == pytest.approx(30 / prefill["seconds"])
    assert prefill["of_matmul"] == pytest.approx(prefill["operations_per_second"] / found["rates"]["matmul"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", 1], "--steps is 1, expected at least 2"),
        (["--batch-sizes", "0,2"], "--batch-sizes is (0, 2), expected 1 or more each"),
        (["--context", 0], "--context is 0, expected at least 1 token"),
        (["--prompt-lengths", 0], "--prompt-lengths is (0,), expected 1 or more each"),
        (
            ["--max-sequences", 64, "--step-tokens", 8],
            "--step-tokens is 8, expected at least --max-sequences 64",
        ),
    ],
)
def test_mistakes_are_one_line(flags: list[object], says: str, files: Files, run: Run) -> None:
    done = run("bench", files.student, *flags)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert says in done.err
