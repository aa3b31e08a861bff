"""The command line (``hrwkv --help`` lists the commands); the only place that prints.

Commands import what they need when they run, so that ``--help`` waits for no library. Every mistake of a
user ends in one line on stderr and exit code 2; an error that is none of theirs keeps its traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter

from hrwkv.cli import (
    adapter,
    bench,
    chat,
    convert,
    demo,
    distill,
    evaluate,
    generate,
    inspect,
    plan,
    published,
    select,
    serve,
)
from hrwkv.cli.interrupt import INTERRUPTED, Stopped, resume_command
from hrwkv.cli.naming import as_flags
from hrwkv.cli.recipes import Command, apply_recipe
from hrwkv.cli.version import version

USER_ERROR, READER_GONE = 2, 141
EPILOGUE = "**Examples**\n\n```\n{examples}\n```\n\nAdd --debug to see where an error came from."
START = """
hrwkv demo
hrwkv convert teacher/ student/ --keep-attention 6
hrwkv distill student/ --teacher teacher/ --stage all
hrwkv eval student-distilled/stage3 --teacher teacher/
"""
COMMANDS: dict[str, tuple[Callable[..., int | None], str]] = {
    "convert": (convert.convert, convert.EXAMPLES),
    "import": (published.import_, published.IMPORT_EXAMPLES),
    "export": (published.export, published.EXPORT_EXAMPLES),
    "inspect": (inspect.inspect, inspect.EXAMPLES),
    "plan": (plan.plan, plan.EXAMPLES),
    "distill": (distill.distill, distill.EXAMPLES),
    "select": (select.select, select.EXAMPLES),
    "eval": (evaluate.evaluate, evaluate.EXAMPLES),
    "generate": (generate.generate, generate.EXAMPLES),
    "chat": (chat.chat, chat.EXAMPLES),
    "serve": (serve.serve, serve.EXAMPLES),
    "bench": (bench.bench, bench.EXAMPLES),
    "demo": (demo.demo, demo.EXAMPLES),
}


def build_app() -> App:
    """The app with all commands."""
    app = App(
        name="hrwkv",
        help="Turn a Transformer into a hybrid of RWKV-7 and a few attention layers.",
        help_epilogue=EPILOGUE.format(examples=START.strip()),
        version=version,
        config=apply_recipe,
        default_parameter=Parameter(negative_iterable=(), negative_none=()),
        help_format="markdown",
        suppress_keyboard_interrupt=False,
    )
    for name, (function, examples) in COMMANDS.items():
        command = Command(name=name, help_epilogue=EPILOGUE.format(examples=examples.strip()))
        command.default(function)
        app.command(command)
    app.command(adapter.build_app(EPILOGUE))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.

    A command may return one of its own, as ``plan`` does for what does not fit (1).
    arguments: as after ``hrwkv``; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    app = build_app()
    try:
        code = app(words, print_error=False, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except Stopped as stop:
        return _fail(f"{stop}; go on with: {resume_command(words, alone=stop.alone)}", INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe went away (``| head``). What is left in the buffer has nowhere to go, and
        # Python would complain about it at exit.
        sys.stdout = None
        return READER_GONE
    except Exception as error:
        if not is_user_error(error):
            raise
        if len(words) < len(given):
            traceback.print_exc()
        line = describe(error, command=words[0] if words else "")
        if isinstance(error, ValueError):  # of others none knows a setting
            line = as_flags(line, flags=_flags(app, words), words=words)
        return _fail(line, USER_ERROR)
    return code if isinstance(code, int) else 0


def is_user_error(error: Exception) -> bool:
    """True for what the arguments, the files or the machine can be blamed for; False for a fault of ours."""
    outside = type(error).__name__ in ("OutOfMemoryError", "SafetensorError")
    return outside or isinstance(error, CycloptsError | ValueError | OSError)


def describe(error: Exception, *, command: str) -> str:
    """One line: what came, what was expected, what to do."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory is full: lower batch_tokens or context_length, or use --device cpu"
    if isinstance(error, CycloptsError):
        known = f" {command}" if command in (*COMMANDS, "adapter") else ""
        return f"{_line(error)} See hrwkv{known} --help"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: choose another place, or make room and allow access there"
    return _line(error)


def _flags(app: App, words: Sequence[str]) -> list[str]:
    """Those of the command that the words name."""
    command = app.parse_commands(words)[1][-1]
    return [name for argument in command.assemble_argument_collection() for name in argument.names]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(line: str, code: int) -> int:
    # Without a terminal's line end after ^C or half a line of output, the message would hang on to it.
    sys.stdout.flush()
    print(f"hrwkv: {line}", file=sys.stderr)
    return code
