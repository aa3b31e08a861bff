"""Conversations typed into ``hrwkv chat``, with a model of a directory and with scripted speakers."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hrwkv.cli.chat import Conversation, Message, rate, read_conversation
from hrwkv.cli.display import Display
from hrwkv.cli.generate import Piece, Writer
from tests.cli.conftest import Files, Run, byte_tokenizer


class Script:
    """Says the next of its answers, each a list of pieces, and keeps what it was asked."""

    max_tokens = 8

    def __init__(self, *answers: list[Piece | BaseException]) -> None:
        self.answers, self.heard, self.attempts = iter(answers), [], []

    def answer(self, messages: list[Message], *, attempt: int) -> Iterator[Piece]:
        self.heard.append([message["content"] for message in messages])
        self.attempts.append(attempt)
        for piece in next(self.answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def plain(*words: str) -> Script:
    return Script(*([Piece(word, 1)] for word in words))


def talk(
    script: Script,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    system: str | None = None,
    terminal: bool = False,
) -> tuple[Conversation, str]:
    """A whole conversation, and what was shown."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr(sys, "stdout", shown)
    display = Display(
        Console(file=shown, force_terminal=terminal, highlight=False, soft_wrap=True, width=200)
    )
    conversation = Conversation(script, display, system=system)
    conversation.run()
    return conversation, shown.getvalue()


def test_it_keeps_forgets_and_regenerates(monkeypatch: pytest.MonkeyPatch) -> None:
    script = plain("A", "B", "C", "D")
    lines = ["one", "", "two", "/regenerate", "/reset", "three", "/exit", "four"]
    conversation, shown = talk(script, lines, monkeypatch, system="brief")
    assert script.heard == [
        ["brief", "one"],
        ["brief", "one", "A", "two"],
        ["brief", "one", "A", "two"],
        ["brief", "three"],
    ]
    assert script.attempts == [0, 1, 2, 3]
    assert [message["content"] for message in conversation.messages] == ["brief", "three", "D"]
    assert shown.split("ends.\n")[1] == "> A\n> > B\n> C\n> 4 messages forgotten\n> D\n> "


def test_a_message_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    script = plain("A", "B")
    talk(
        script,
        ['"""', "def f():", "    return 1", "", "/reset", '"""', "/etc/hosts is a path", '"""', "lost"],
        monkeypatch,
    )
    assert script.heard == [
        ["def f():\n    return 1\n\n/reset"],
        ["def f():\n    return 1\n\n/reset", "A", "/etc/hosts is a path"],
    ]


def test_another_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    script = plain("A", "B", "C")
    _, shown = talk(script, ["1", "/system be loud", "2", "/reset", "3", "/system"], monkeypatch)
    assert "> instruction: be loud\n> B\n" in shown
    assert shown.endswith("> no instruction\n> ")
    assert script.heard == [["1"], ["be loud", "1", "A", "2"], ["be loud", "3"]]


def test_save_and_load_give_the_conversation_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    first, _ = talk(
        plain("na\u00efve", "B"), ["1", f"/save {path}", "2", f"/save {path}"], monkeypatch, system="s"
    )
    script = plain("C")
    second, _ = talk(script, [f"/load {path}", "3"], monkeypatch)
    assert script.heard == [["s", "1", "na\u00efve", "2", "B", "3"]]
    assert second.messages[:-2] == first.messages
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]


def test_save_writes_over_nothing_else_and_load_takes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, odd, path = tmp_path / "notes.txt", tmp_path / "odd.json", tmp_path / "missing"
    notes.write_text("mine")
    odd.write_text('{"messages": [{"role": "king", "content": "x"}]}')
    lines = ["1", f"/save {notes}", f"/load {notes}", f"/load {odd}", f"/load {path}", f"/save {path}/x", "2"]
    script = plain("A", "B")
    _, shown = talk(script, lines, monkeypatch)
    assert notes.read_text() == "mine"
    assert shown.count("notes.txt is no conversation that /save has written") == 2
    assert "expected a role and a text" in shown
    assert f"{path}: No such file or directory\n" in shown
    assert f"{path} is no directory: make it first" in shown
    assert script.heard[1] == ["1", "A", "2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/foo", "/foo is no command: /help"),
        ("/reset now", "/reset now is no command"),
        ("/save", "/save needs a file"),
        ("/regenerate", "there is no answer yet"),
        ("/help", "/regenerate answers again"),
    ],
)
def test_commands_that_send_nothing(line: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = plain()
    _, shown = talk(script, [line], monkeypatch)
    assert says in shown
    assert script.heard == []


def test_an_answer_that_fails_costs_its_message_only(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([Piece("A", 1)], [Piece("half", 1), ValueError("too\nlong")], [Piece("C", 1)])
    conversation, shown = talk(script, ["1", "2", "/regenerate"], monkeypatch)
    assert "half\ntoo long\n" in shown
    assert script.heard == [["1"], ["1", "A", "2"], ["1"]]
    assert [message["content"] for message in conversation.messages] == ["1", "C"]


def test_an_interrupted_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([Piece("half", 1), KeyboardInterrupt()], [Piece("B", 1)])
    talk(script, ["1", "2"], monkeypatch)
    assert script.heard[1] == ["1", "half", "2"]


@pytest.mark.parametrize("piece", [[], [Piece("hm", 1, is_reasoning=True)]])
def test_an_answer_that_is_interrupted_before_it_began_leaves_no_trace(
    piece: list[Piece], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty answer stood in the conversation from then on, in place of the old one after /regenerate."""
    script = Script([Piece("A", 1)], [*piece, KeyboardInterrupt()], [*piece, KeyboardInterrupt()])
    conversation, shown = talk(script, ["1", "2", "/regenerate"], monkeypatch)
    assert [message["content"] for message in conversation.messages] == ["1", "A"]
    assert shown.count("interrupted, nothing is kept") == 2


CTRL_C = "\x03"
ASKED = "Save this conversation? A file's name, or Enter to forget it: "


class Terminal(io.StringIO):
    """A terminal's lines, one of which may be Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline(size)
        if line.strip("\n") == CTRL_C:
            raise KeyboardInterrupt
        return line


def typed(script: Script, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Conversation, str]:
    """The same as ``talk`` at a terminal."""
    monkeypatch.setattr("tests.cli.test_chat.io.StringIO", Terminal)
    return talk(script, lines, monkeypatch)


def test_ctrl_c_drops_a_line_and_twice_in_a_row_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one ended the process, and the conversation with it."""
    script = plain("A", "B")
    lines = [CTRL_C, "1", CTRL_C, "", CTRL_C, '"""', "lost", CTRL_C, "2", CTRL_C, CTRL_C, "", "3"]
    conversation, shown = typed(script, lines, monkeypatch)
    assert [message["content"] for message in conversation.messages] == ["1", "A", "2", "B"]
    assert shown.count("Ctrl-C again, Ctrl-D or /exit leaves.\n") == 5
    assert shown.endswith(ASKED)


def test_ctrl_c_ends_what_reads_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        typed(plain("A"), ["1", CTRL_C], monkeypatch)


@pytest.mark.parametrize("end", [["/exit"], [], [CTRL_C, CTRL_C]], ids=["exit", "ctrl-d", "ctrl-c"])
def test_who_leaves_may_save(end: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, notes = tmp_path / "talk.json", tmp_path / "notes"
    notes.write_text("mine")
    if end:
        conversation, shown = typed(plain("A"), ["1", *end, str(notes), str(path)], monkeypatch)
        assert read_conversation(path) == conversation.messages
        assert (shown.count(ASKED), notes.read_text()) == (2, "mine")
        assert shown.endswith(f"2 messages in {path}\n")
    else:
        _, shown = typed(plain("A"), ["1"], monkeypatch)
        assert shown.endswith(f"{ASKED}\n")
    _, shown = typed(plain("A"), ["1", *(end or ["/exit"]), CTRL_C], monkeypatch)
    assert shown.endswith(f"{ASKED}\n")


def test_nobody_is_asked_where_there_is_nothing_to_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.json"
    _, piped = talk(plain("A"), ["1"], monkeypatch)
    _, empty = typed(plain(), ["/system be brief"], monkeypatch)
    _, saved = typed(plain("A"), ["1", f"/save {path}", "/exit"], monkeypatch)
    _, loaded = typed(plain(), [f"/load {path}", "/exit"], monkeypatch)
    _, forgotten = typed(plain("A"), ["1", "/reset", "/exit"], monkeypatch)
    assert not [shown for shown in (piped, empty, saved, loaded, forgotten) if ASKED in shown]
    _, grown = typed(plain("B"), [f"/load {path}", "2", "/exit"], monkeypatch)
    assert ASKED in grown


@pytest.mark.parametrize(("tokens", "told"), [(7, False), (8, True)])
def test_an_answer_that_is_cut_off_says_so(tokens: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in the middle of a sentence as if the model had meant it."""
    _, shown = talk(Script([Piece("so", tokens)]), ["1"], monkeypatch, terminal=True)
    assert ("cut off: --max-tokens is 8" in shown) == told


def test_an_answer_commands_a_terminal_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, or a server, could set its title, move the cursor and more."""
    pieces = [Piece("\x1b[2J\x9b", 1, is_reasoning=True), Piece("a\x1b]0;owned\x07\r\tb\n\u00e9", 2)]
    conversation, shown = talk(Script(pieces), ["1"], monkeypatch, terminal=True)
    assert "\u241b[2J\ufffd" in shown
    assert "a\u241b]0;owned\u2407\u240d\tb\n\u00e9" in shown
    assert conversation.messages[-1]["content"] == pieces[1].text
    _, piped = talk(Script(pieces), ["1"], monkeypatch)
    assert pieces[1].text in piped


def test_reasoning_is_shown_and_not_kept_and_a_terminal_sees_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script([Piece("[b]hm[/b]", 1, is_reasoning=True), Piece("\tso", 2), Piece("", 7)])
    conversation, shown = talk(script, ["1"], monkeypatch, terminal=True)
    assert "[b]hm[/b]" in shown
    assert conversation.messages[-1]["content"] == "\tso"
    assert "\tso\n" in shown
    assert "[7 tokens, the first after 0.00 s, " in shown
    assert rate(7, 0.5, 2.0) == "[7 tokens, the first after 0.50 s, 3.0 tokens/s]"
    assert rate(1, 0.5, 0.0) == "[1 tokens, the first after 0.50 s]"


@pytest.fixture
def talker(files: Files, tmp_path: Path) -> Path:
    """A student with two chat templates, stop texts and several end tokens, as a preset makes it."""
    path = tmp_path / "talker"
    shutil.copytree(files.student, path)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "no_reasoning.jinja").write_text(
        "{{ raise_exception('too\nlong') if messages | length > 3 }}quick: {{ messages[-1].content }}"
    )
    stops = {"eos_token_id": [256, 258], "stop_strings": [" <sep>", "<sep>"]}
    (path / "generation_config.json").write_text(json.dumps(stops))
    return path


def say(monkeypatch: pytest.MonkeyPatch, lines: list[str], tokens: list[int]) -> list[str]:
    """Let the user type ``lines`` and the model choose ``tokens``; the prompts that the model gets."""
    heard, answer, chosen = [], Writer.answer, iter(tokens)

    def listen(writer: Writer, ids: list[int], *, attempt: int = 0) -> Iterator[Piece]:
        heard.append(writer.tokenizer.decode(ids))
        return answer(writer, ids, attempt=attempt)

    monkeypatch.setattr(Writer, "answer", listen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(
        "hrwkv.model.generate.choose_tokens", lambda logits, sampling, generator: torch.tensor([next(chosen)])
    )
    return heard


def test_an_answer_ends_at_every_stop_text_and_every_end_token(
    talker: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop text is neither seen nor kept; two answers end by text, two by token, one by length."""
    encode = byte_tokenizer().encode
    answers = [
        encode("a <sep>"),
        encode("b##"),
        [*encode("c <se"), 256],
        [*encode("d"), 258],
        encode("e" * 9),
    ]
    heard = say(monkeypatch, ["1", "2", "3", "4", "5", "6"], [*sum(answers, []), 256])
    done = run("chat", talker, "--stop", "##", "--max-tokens", 9)
    assert done.code == 0
    assert heard[-1] == (
        "user: 1\nassistant: a\nuser: 2\nassistant: b\nuser: 3\nassistant: c <se\n"
        "user: 4\nassistant: d\nuser: 5\nassistant: eeeeeeeee\nuser: 6\n"
    )
    assert done.out.split("ends.\n")[1] == "> a\n> b\n> c <se\n> d\n> eeeeeeeee\n> \n> "


@pytest.mark.parametrize(
    ("flags", "prompt"), [((), "user: hello\n"), (("--no-reasoning",), "quick: hello")], ids=["default", "no"]
)
def test_the_template_of_its_name_is_taken(
    flags: tuple[str, ...], prompt: str, talker: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = say(monkeypatch, ["hello"], [256])
    assert run("chat", talker, *flags).code == 0
    assert heard == [prompt]


def test_a_template_that_is_missing_or_refuses_is_named(
    files: Files, talker: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("chat", files.student, "--no-reasoning")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "student has no chat template named no_reasoning: leave out --no-reasoning" in done.err
    heard = say(monkeypatch, ["one", "two", "/reset", "three"], [256, 256])
    done = run("chat", talker, "--no-reasoning", "--system", "x")
    assert "the model's chat template refuses the conversation: too long" in done.out
    assert heard == ["quick: one", "quick: three"]
    (talker / "chat_template.jinja").unlink()
    done = run("chat", talker)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "talker has no chat template: use hrwkv generate" in done.err
    done = run("chat", talker, "--api-key-file", talker / "key")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is for a server" in done.err


def test_the_writers_pieces_count_tokens_and_an_attempt_draws_anew(files: Files) -> None:
    from hrwkv.cli.generate import SamplingSettings

    writer = Writer.open(
        files.student, SamplingSettings(max_tokens=12, temperature=1.0, seed=3, device="cpu")
    )
    ids = writer.tokenizer("the quick")["input_ids"]
    answers = [list(writer.answer(ids, attempt=attempt)) for attempt in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][-1].num_tokens == 12
