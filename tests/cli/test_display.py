import io

import pytest
from rich.console import Console

from hrwkv.cli.display import Display, count, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.9, "60 s"),
        (75.2, "1 min 15 s"),
        (7384.0, "2 h 03 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1500, "1.5 k"), (1_836_544, "1.84 M"), (20_900_000_000, "20.9 B")],
)
def test_count(number: int, text: str) -> None:
    assert count(number) == text


def test_texts_are_not_read_as_markup() -> None:
    file = io.StringIO()
    display = Display(Console(file=file, width=60))
    display.line("[bold]a[/bold] [/]")
    display.table("t", ["m", "n"], [["[red]x", "1"]])
    display.columns("def f(): [/]", ["a", "b"], ["x[0]", "[/b]"])
    assert "[bold]a[/bold] [/]" in file.getvalue()
    assert "[red]x" in file.getvalue()
    assert "[/b]" in file.getvalue()


def test_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No control characters and no drawing where there is no terminal."""
    times = iter([0.0, 1.0, 20.0, 20.0])
    monkeypatch.setattr("hrwkv.cli.display.time.monotonic", lambda: next(times))
    file = io.StringIO()
    with Display(Console(file=file, width=80)).task("Stage 1", 10) as task:
        task.advance(1, "early")
        task.advance(5, "loss 0.5")
        task.say("kept")
    assert file.getvalue() == "Stage 1: 50% loss 0.5\nkept\n"
