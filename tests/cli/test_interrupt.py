"""Ctrl-C once asks, twice ends; the line that goes on can be pasted."""

import os
import shlex
import signal

import pytest

from hrwkv.cli.display import Display
from hrwkv.cli.interrupt import StopSignal, resume_command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal(Display()) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) == before


def test_the_second_one_ends() -> None:
    with StopSignal(Display()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt, match="^$"):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_command_that_goes_on() -> None:
    words = ["distill", "my teacher", "--out", "run"]
    assert shlex.split(resume_command(words, alone=True)) == ["hrwkv", *words, "--resume"]
    assert resume_command([*words, "--resume"], alone=True).count("--resume") == 1
