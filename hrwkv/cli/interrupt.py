"""Ctrl-C during training: the step is finished and saved, and the line that goes on with it is shown."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from types import FrameType

from hrwkv.cli.display import Display

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):  # noqa: N818 (named like what it is a kind of)
    """An interruption after which the same command goes on with ``--resume``; says what was reached."""


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


def resume_command(words: Sequence[str]) -> str:
    """The command line that goes on. words: as after ``hrwkv``."""
    return shlex.join(["hrwkv", *words, *([] if "--resume" in words else ["--resume"])])
