"""What a terminal shows: tables, a progress line per task, and plain lines where there is no terminal.

Everything goes to stdout; stderr carries the one line of an error and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

# Of the first 32 characters and delete, all but tab and line end stand for commands to a terminal: their
# pictures are shown instead. The 32 behind ASCII are commands too, to some.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
# Without a terminal (a pipe, a log file) a running task says where it is this often.
PLAIN_SECONDS = 15.0


class Task:
    """One running task with a known end; ``done`` moves it, whatever stands behind it."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.title, self.total, self.note, self.value = title, total, "", 0
        self._console, self._said = console, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Task:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        """Take the line away."""
        self._bar.stop()

    def advance(self, value: int, note: str = "", *, total: int | None = None) -> None:
        """Say that ``value`` of the total is done."""
        self.value, self.note, self.total = value, note, total or self.total
        self._bar.update(self._task, completed=value, note=note, total=self.total)
        if not self._console.is_terminal and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self._console.print(f"{self.title}: {value / max(self.total, 1):.0%} {note}".rstrip())

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        self._console.print(Text(line))


class Display:
    """The console of one command."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, text: str, style: str = "") -> None:
        """One line of text, never read as markup."""
        self.console.print(Text(text, style=style))

    def piece(self, text: str, style: str = "") -> None:
        """Text that goes on where the last piece ended, at once."""
        self.console.print(Text(text, style=style), end="")
        self.console.file.flush()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A titled step; says how long it took."""
        self.line(title, "bold")
        start = time.monotonic()
        yield
        self.line(f"  done in {duration(time.monotonic() - start)}", "dim")

    def task(self, title: str, total: int) -> Task:
        """A progress line, to be used with ``with``."""
        return Task(self.console, title, total)

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """A table whose first column is text and whose others are numbers."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for number, name in enumerate(header):
            # A narrow terminal wraps headers and names at spaces, and never a number.
            words = [word for row in rows for word in (row[0].split() if not number else [row[number]])]
            widest = max(map(len, [*words, *name.split()]), default=0)
            table.add_column(name, justify="right" if number else "left", min_width=widest)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        # soft_wrap would let a wide table run over the edge instead of fitting it.
        self.console.print(table, soft_wrap=False)

    def columns(self, title: str, names: list[str], texts: list[str]) -> None:
        """Texts side by side, as they are, under a common title."""
        table = Table(title=Text(title), title_justify="left", header_style="bold", expand=True)
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(text) for text in texts))
        self.console.print(table, soft_wrap=False)


def visible(text: str) -> str:
    """A text that is not ours, without what would move the cursor, ring, or change the terminal."""
    return text.translate(VISIBLE)


def duration(seconds: float) -> str:
    """Seconds for a reader: 75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int) -> str:
    """A count for a reader: 1836544 -> '1.84 M'."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)
