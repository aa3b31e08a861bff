"""``hrwkv chat``: a conversation with the model of a directory or of a server."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

from cyclopts import Parameter

from hrwkv.cli.chat_server import ServerModel
from hrwkv.cli.display import Display, visible
from hrwkv.cli.generate import Piece, SamplingSettings, Writer

EXAMPLES = """
hrwkv chat run/stage2
hrwkv chat run/stage2 --system "Answer briefly." --temperature 0
hrwkv chat reka-hybrid --no-reasoning
hrwkv chat http://127.0.0.1:8000 --api-key-file key.txt
"""
# The name of the tokenizer's template for answers without reasoning, beside "default".
NO_REASONING = "no_reasoning"
BLOCK = '"""'
HELP = (
    f"Type a message; lines between two lines of {BLOCK} are one.",
    "/regenerate answers again, /system TEXT gives another instruction (none without TEXT),",
    "/save FILE and /load FILE keep the conversation, /reset forgets it, /exit or Ctrl-D ends it.",
    "Ctrl-C ends an answer, or drops the line that is typed; twice in a row it leaves.",
)
LEAVING = "Ctrl-C again, Ctrl-D or /exit leaves."
KEEPING = "Save this conversation? A file's name, or Enter to forget it: "
Message: TypeAlias = dict[str, str]


def chat(
    model: Annotated[str, Parameter(help="Directory of a model with a chat template, or a server's URL.")],
    /,
    *,
    system: Annotated[str | None, Parameter(help="Instruction before the conversation.")] = None,
    no_reasoning: Annotated[bool, Parameter(help="Answer at once, without reasoning.", negative=())] = False,
    api_key_file: Annotated[Path | None, Parameter(help="File with the key for a server.")] = None,
    settings: Annotated[SamplingSettings, Parameter(name="*", group="Sampling")] = SamplingSettings(),  # noqa: B008 (frozen)
) -> None:
    """Talk with a model; /help lists what can be typed besides messages."""
    speaker: Speaker
    if model.startswith(("http://", "https://")):
        speaker = ServerModel.open(
            model, settings=settings, no_reasoning=no_reasoning, api_key_file=api_key_file
        )
    elif re.match(r"[\w.-]+:\d+(/|$)", model) and not Path(model).exists():
        raise ValueError(f"{model} is no directory; if it is a server, give its URL: http://{model}")
    elif api_key_file is not None:
        raise ValueError(f"--api-key-file is for a server, and {model} is none: give a URL, http://...")
    else:
        speaker = LocalModel.open(Path(model), settings, no_reasoning=no_reasoning)
    Conversation(speaker, Display(), system=system).run()


class Speaker(Protocol):
    """Whoever answers, in so many tokens at most."""

    @property
    def max_tokens(self) -> int:
        """Of one answer."""

    def answer(self, messages: list[Message], *, attempt: int) -> Iterator[Piece]:
        """The answer as it comes; ``attempt`` numbers the answers. Raises ValueError if there is none."""


@dataclass(frozen=True)
class LocalModel:
    """The model of a directory, with its chat template."""

    writer: Writer
    template: str

    @classmethod
    def open(cls, path: Path, settings: SamplingSettings, *, no_reasoning: bool) -> LocalModel:
        """Raises ValueError for a directory that does not open or has no such template."""
        writer = Writer.open(path, settings)
        return cls(writer, _chat_template(writer.tokenizer, path, no_reasoning=no_reasoning))

    @property
    def max_tokens(self) -> int:
        """Of one answer."""
        return self.writer.sampling.max_new_tokens

    def answer(self, messages: list[Message], *, attempt: int) -> Iterator[Piece]:
        """The answer as it comes. Raises ValueError if the template refuses the conversation."""
        ids = _prompt(self.writer.tokenizer, messages, self.template)
        return self.writer.answer(ids, attempt=attempt)


class Conversation:
    """Messages so far, and what a user may type to add to them."""

    def __init__(self, speaker: Speaker, display: Display, *, system: str | None = None) -> None:
        self.messages: list[Message] = []
        self._speaker, self._display, self._attempts = speaker, display, 0
        self._set_system(system or "")
        self._start = list(self.messages)
        self._in_file = self.messages

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C twice."""
        _edit_lines()
        self._display.line("Type a message; /help says what else, /exit or Ctrl-D ends.", "dim")
        while (text := self._ask()) not in (None, "/exit"):
            assert text is not None
            name, _, argument = text.partition(" ")
            try:
                if re.fullmatch("/[a-z]+", name):
                    self._command(name, argument.strip())
                else:
                    self._answer([*self.messages, {"role": "user", "content": text}])
            except (ValueError, OSError) as error:
                # The conversation goes on without the message that failed.
                self._complain(error)
            except KeyboardInterrupt:
                self._display.line("interrupted", "dim")
        self._offer_to_save()

    def _offer_to_save(self) -> None:
        """The last moment for a conversation that no file has; a pipe is not asked."""
        is_told = any(message["role"] == "assistant" for message in self.messages)
        if not sys.stdin.isatty() or not is_told or self.messages == self._in_file:
            return
        try:
            while name := input(KEEPING).strip():
                try:
                    self._save(Path(name).expanduser())
                    return
                except (ValueError, OSError) as error:
                    self._complain(error)
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")

    def _complain(self, error: Exception) -> None:
        line = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            line = f"{error.filename}: {error.strerror}"
        self._display.line(line, "red")

    def _command(self, name: str, argument: str) -> None:
        """Raises ValueError for a name that is none, and for an argument too few or too many."""
        with_file = {"/save": self._save, "/load": self._load}
        plain = {"/reset": self._reset, "/regenerate": self._regenerate, "/help": self._help}
        if name == "/system":
            self._set_system(argument)
            self._display.line(f"instruction: {argument}" if argument else "no instruction", "dim")
        elif name in with_file:
            if not argument:
                raise ValueError(f"{name} needs a file: {name} FILE")
            with_file[name](Path(argument).expanduser())
        elif name in plain and not argument:
            plain[name]()
        else:
            raise ValueError(f"{name} {argument}".strip() + " is no command: /help lists them")

    def _answer(self, messages: list[Message]) -> None:
        """Stream the answer to messages that end with the user's, and keep both."""
        answer, started, first, piece = "", time.monotonic(), 0.0, Piece("", 0)
        try:
            for piece in self._speaker.answer(messages, attempt=self._attempts):
                first = first or time.monotonic()
                self._show(piece)
                answer += "" if piece.is_reasoning else piece.text
        except KeyboardInterrupt:
            self._display.line(" ... interrupted" if answer else " ... interrupted, nothing is kept", "dim")
            if not answer:
                return
        finally:
            self._attempts += 1
            sys.stdout.write("\n")
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if self._display.console.is_terminal and piece.num_tokens:
            self._display.line(rate(piece.num_tokens, first - started, time.monotonic() - first), "dim")
            if piece.num_tokens >= self._speaker.max_tokens:
                self._display.line(f"cut off: --max-tokens is {self._speaker.max_tokens}", "dim")

    def _show(self, piece: Piece) -> None:
        """Reasoning is dim; the answer goes out as it is, tabs included, but commands a terminal nothing."""
        text = visible(piece.text) if self._display.console.is_terminal else piece.text
        if piece.is_reasoning:
            self._display.piece(text, "dim")
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _regenerate(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer yet to give again")
        self._answer(self.messages[:-1])

    def _reset(self) -> None:
        self._display.line(f"{len(self.messages) - len(self._start)} messages forgotten", "dim")
        self.messages = list(self._start)

    def _help(self) -> None:
        for line in HELP:
            self._display.line(line, "dim")

    def _set_system(self, text: str) -> None:
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *said]
        self._start = self.messages[: len(self.messages) - len(said)]

    def _save(self, path: Path) -> None:
        if path.exists():
            read_conversation(path)  # nothing but an older conversation is written over
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no directory: make it first, or save elsewhere")
        beside = path.with_name(f"{path.name}.part")
        beside.write_text(json.dumps({"messages": self.messages}, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
        self._in_file = self.messages
        self._display.line(f"{len(self.messages)} messages in {path}", "dim")

    def _load(self, path: Path) -> None:
        self._in_file = self.messages = read_conversation(path)
        self._start = [message for message in self.messages if message["role"] == "system"]
        self._display.line(f"{len(self.messages)} messages from {path}", "dim")

    def _ask(self) -> str | None:
        """The next message that is not empty; None at the end of the input, and at Ctrl-C twice in a row."""
        is_pressed = False
        while True:
            try:
                text = input("> ").strip()
                is_pressed = False
                if text := _read_block() if text == BLOCK else text:
                    return text
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                sys.stdout.write("\n")
                if is_pressed:
                    return None
                is_pressed = True
                self._display.line(LEAVING, "dim")


def _edit_lines() -> None:
    """Arrow keys, earlier lines, and a paste of many lines as one message; where Python has readline."""
    if sys.stdin.isatty() and find_spec("readline"):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def _read_block() -> str:
    """The lines up to the end of a block. Raises EOFError at the end of the input."""
    lines: list[str] = []
    while (line := input(". ")).strip() != BLOCK:
        lines.append(line)
    return "\n".join(lines).strip()


def read_conversation(path: Path) -> list[Message]:
    """The messages of a file that /save wrote. Raises ValueError for any other, OSError for none."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        found = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no conversation that /save has written") from error
    for message in found:
        if message["role"] not in ("system", "user", "assistant") or not isinstance(message["content"], str):
            raise ValueError(f"{path} has a message {message}, expected a role and a text")
    return found


def rate(num_tokens: int, first: float, rest: float) -> str:
    """How fast an answer came: seconds to its first piece, and then tokens a second."""
    speed = f", {(num_tokens - 1) / rest:.1f} tokens/s" if num_tokens > 1 and rest > 0 else ""
    return f"[{num_tokens} tokens, the first after {first:.2f} s{speed}]"


def _chat_template(tokenizer: Any, model: Path, *, no_reasoning: bool) -> str:
    """The template to talk with. Raises ValueError if the tokenizer has none of that name."""
    own = tokenizer.chat_template
    templates = own if isinstance(own, dict) else {"default": own}
    template: str | None = templates.get(NO_REASONING if no_reasoning else "default")
    if template:
        return template
    if no_reasoning:
        raise ValueError(
            f"{model} has no chat template named {NO_REASONING}: leave out --no-reasoning, or write one as "
            f"additional_chat_templates/{NO_REASONING}.jinja"
        )
    raise ValueError(f"{model} has no chat template: use hrwkv generate, or a model that was trained to chat")


def _prompt(tokenizer: Any, messages: list[dict[str, str]], template: str) -> list[int]:
    """Token ids of a conversation. Raises ValueError if the template refuses it."""
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
    ids: list[int] = encoded["input_ids"]
    return ids
