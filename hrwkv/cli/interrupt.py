"""Ctrl-C during training: the step is finished and saved, and the line that goes on with it is shown."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from hrwkv.cli.display import Display

if TYPE_CHECKING:
    from hrwkv.distill.parallel import Ranks

INTERRUPTED = 130  # exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # noqa: N818 (named like what it is a kind of)
    """An interruption after which the same command goes on with ``--resume``; says what was reached.

    alone: the command was started as it is, without torchrun before it.
    """

    def __init__(self, reached: str, *, alone: bool = True) -> None:
        super().__init__(reached)
        self.alone = alone


@contextmanager
def told_once(ranks: Ranks) -> Iterator[None]:
    """Of several processes that have stopped, let the first one alone say so."""
    try:
        yield
    except Stopped as stop:
        if not ranks.is_first:
            raise SystemExit(INTERRUPTED) from stop
        raise Stopped(str(stop), alone=ranks.world == 1) from stop


class StopSignal:
    """Asks a run to end at its next step, once Ctrl-C or SIGTERM has come; a second one ends it at once."""

    def __init__(self, display: Display) -> None:
        self._display, self._asked = display, False

    def __enter__(self) -> StopSignal:
        """Take the signals."""
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether the run must end."""
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self.__exit__()
        self._display.line("Finishing the step and saving; Ctrl-C again ends at once, without")


def resume_command(words: Sequence[str], *, alone: bool) -> str:
    """The command line that goes on. words: as after ``hrwkv``; alone: see ``Stopped``."""
    if not alone:
        return "the same torchrun line" + ("" if "--resume" in words else " and --resume")
    return shlex.join(["hrwkv", *words, *([] if "--resume" in words else ["--resume"])])
