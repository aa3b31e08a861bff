"""``hrwkv generate``: text from any model directory, streamed as it comes."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from hrwkv.cli.loading import open_writer
from hrwkv.settings.checks import require

if TYPE_CHECKING:
    from hrwkv.model.generate import Sampling

EXAMPLES = """
hrwkv generate run/stage2 --prompt "def main():" --max-tokens 100
hrwkv generate run/stage2 --prompt-file question.txt --temperature 0.8 --top-p 0.9 --seed 1
"""


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

    def __post_init__(self) -> None:
        """Raise ValueError for what no model and no server can do."""
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")


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
    for piece in writer.answer(writer.tokenizer(text)["input_ids"]):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, whether it is reasoning, and the tokens of the answer up to here."""

    text: str
    num_tokens: int
    is_reasoning: bool = False


@dataclass(frozen=True)
class Writer:
    """A model of a directory, with how it is to write."""

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

    def answer(self, ids: list[int], *, attempt: int = 0) -> Iterator[Piece]:
        """The continuation of ``ids`` as it comes; another ``attempt`` draws other tokens."""
        from hrwkv.model.generate import read_text, stream_tokens

        sampling = replace(self.sampling, seed=self.sampling.seed + attempt)
        count = 0

        def counted() -> Iterator[int]:
            nonlocal count
            for token in stream_tokens(self.model, ids, sampling=sampling):
                count += 1
                yield token

        for text in read_text(self.tokenizer, ids, tokens=counted(), stop=sampling.stop):
            yield Piece(text, count)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _read(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 ({error.reason} at byte {error.start})") from error
