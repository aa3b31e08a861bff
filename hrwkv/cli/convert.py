"""``hrwkv convert``: a teacher's directory in, a student's directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hrwkv.cli.display import Display, count
from hrwkv.settings import ConvertSettings

EXAMPLES = """
hrwkv convert teacher/ student/ --keep-attention 6
hrwkv convert teacher/ student/ --attention-layers 8,15,22
hrwkv convert teacher/ hybrid/ --attention-layers 7 --mixers-from run/stage1
"""


def convert(
    teacher: Annotated[Path, Parameter(help="Directory of a Llama, Mistral, Qwen2 or Qwen3 model.")],
    out: Annotated[Path, Parameter(help="Directory to write; it must not exist.")],
    /,
    *,
    settings: Annotated[ConvertSettings | None, Parameter(name="*", group="Recipe keys")] = None,
    mixers_from: Annotated[
        Path | None,
        Parameter(help="Student of the same teacher whose RWKV layers are copied instead of made new."),
    ] = None,
    recipe: Annotated[
        str | None, Parameter(help="TOML file, or name of a shipped recipe; its [convert] is read.")
    ] = None,
) -> None:
    """Turn a Transformer into a hybrid of RWKV-7 and attention layers, ready to be distilled."""
    display = Display()
    student = run_convert(display, teacher, out, settings or ConvertSettings(), mixers_from=mixers_from)
    display.line(f"Next: hrwkv distill {student} --teacher {teacher} --stage all")


def run_convert(
    display: Display, teacher: Path, out: Path, settings: ConvertSettings, *, mixers_from: Path | None = None
) -> Path:
    """Convert with a progress line, and say what was made."""
    from hrwkv.convert.transfer import convert as transfer

    with display.task("Converting", 1) as task:

        def report(name: str, number: int, total: int) -> None:
            task.advance(number, name, total=total)

        made = transfer(teacher, out, settings, mixers_from=mixers_from, report=report)
    layers, attention = made.config.num_hidden_layers, len(made.attention_layers)
    kept = ", ".join(map(str, made.attention_layers)) or "none"
    display.line(
        f"{made.path}: {layers - attention} of {layers} layers are RWKV-7, attention: {kept}; "
        f"{count(made.parameters)} parameters, of {made.copied + made.fresh + made.aligned} tensors "
        f"{made.copied} copied, {made.aligned} aligned before, {made.fresh} new"
    )
    if made.dropped:
        display.line(f"Left behind: {len(made.dropped)} tensors of the teacher, named in conversion.json")
    return made.path
