"""``hrwkv generate`` and ``hrwkv chat``: text from any model directory, streamed as it comes."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from hrwkv.cli.display import Display
from hrwkv.cli.loading import open_writer

if TYPE_CHECKING:
    from hrwkv.model.generate import Sampling

GENERATE_EXAMPLES = """
hrwkv generate run/stage2 --prompt "def main():" --max-tokens 100
hrwkv generate run/stage2 --prompt-file question.txt --temperature 0.8 --top-p 0.9 --seed 1
"""
CHAT_EXAMPLES = """
hrwkv chat run/stage2
hrwkv chat run/stage2 --system "Answer briefly." --temperature 0
hrwkv chat reka-hybrid --no-reasoning
"""
# The name of the tokenizer's template for answers without reasoning, beside "default".
NO_REASONING = "no_reasoning"


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen, and where a text ends."""

    max_tokens: int = 256
    """Tokens to write at most; the end-of-text token ends it earlier."""
    temperature: float | None = None
    """0 takes the most probable token; left out, the model's generation config decides."""
    top_p: float | None = None
    """Keep the most probable tokens that together have this probability."""
    top_k: int | None = None
    """Keep this many of the most probable tokens."""
    seed: int | None = None
    """Seed of the sampling, for the same text again; left out, every run is another one."""
    stop: tuple[str, ...] = ()
    """Text that ends the answer, as the model's own stop texts do, and is not part of it; may be given more
    than once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the weights are held in; bfloat16 is for GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""


def generate(
    model: Annotated[Path, Parameter(help="Directory of a student, or of any model that convert takes.")],
    /,
    *,
    prompt: Annotated[str | None, Parameter(help="Text to continue.", allow_leading_hyphen=True)] = None,
    prompt_file: Annotated[Path | None, Parameter(help="UTF-8 file with the text to continue.")] = None,
    settings: Annotated[SamplingSettings, Parameter(name="*", group="Sampling")] = SamplingSettings(),  # noqa: B008 (frozen)
) -> None:
    """Continue a text, writing it as it is made."""
    if (prompt is None) == (prompt_file is None):
        came = "neither" if prompt is None else "both"
        raise ValueError(f"{came} of --prompt and --prompt-file given, expected exactly one of them")
    text = prompt if prompt is not None else _read(prompt_file)
    if not text:
        raise ValueError("the prompt is empty: give at least one character")
    writer = Writer.open(model, settings)
    sys.stdout.write(text)
    writer.stream(writer.tokenizer(text)["input_ids"])
    sys.stdout.write("\n")


def chat(
    model: Annotated[Path, Parameter(help="Directory of a model whose tokenizer has a chat template.")],
    /,
    *,
    system: Annotated[str | None, Parameter(help="Instruction before the conversation.")] = None,
    no_reasoning: Annotated[bool, Parameter(help="Answer at once, without reasoning.", negative=())] = False,
    settings: Annotated[SamplingSettings, Parameter(name="*", group="Sampling")] = SamplingSettings(),  # noqa: B008 (frozen)
) -> None:
    """Talk with a model; /reset forgets the conversation, /exit or Ctrl-D ends it."""
    writer = Writer.open(model, settings)
    template = _chat_template(writer.tokenizer, model, no_reasoning=no_reasoning)
    display = Display()
    display.line("Type a message; /reset forgets the conversation, /exit or Ctrl-D ends it.", "dim")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while (text := _ask()) not in (None, "/exit"):
        if text == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        ids = _prompt(writer.tokenizer, messages, template)
        messages.append({"role": "assistant", "content": writer.stream(ids)})
        sys.stdout.write("\n")


@dataclass(frozen=True)
class Writer:
    """A model that writes to stdout."""

    model: Any
    tokenizer: Any
    sampling: Sampling

    @classmethod
    def open(cls, path: Path, settings: SamplingSettings) -> Writer:
        """Model and tokenizer of a directory; its generation config fills what the flags leave out.

        Its stop texts are added to those of the flags.
        """
        from hrwkv.model.generate import Sampling

        model, tokenizer = open_writer(path, device=settings.device, dtype=settings.dtype)
        default = model.generation_config
        given = settings.temperature
        temperature = given if given is not None else (default.temperature or 1.0) * bool(default.do_sample)
        own = default.stop_strings or ()
        sampling = Sampling(
            max_new_tokens=settings.max_tokens,
            temperature=temperature,
            top_p=_first(settings.top_p, default.top_p, 1.0),
            top_k=_first(settings.top_k, default.top_k, 0),
            seed=secrets.randbits(31) if settings.seed is None else settings.seed,
            stop=(*settings.stop, *([own] if isinstance(own, str) else own)),
        )
        return cls(model, tokenizer, sampling)

    def stream(self, ids: list[int]) -> str:
        """Write the continuation of ``ids`` to stdout as it comes, and return it."""
        from hrwkv.model.generate import stream_text

        pieces = []
        for piece in stream_text(self.model, self.tokenizer, ids, sampling=self.sampling):
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        return "".join(pieces)


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


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _ask() -> str | None:
    """The next message; None at the end of the input."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return None
        if text:
            return text


def _read(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 ({error.reason} at byte {error.start})") from error
