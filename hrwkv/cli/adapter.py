"""``hrwkv adapter merge``: a model's directory and an adapter in, a directory of the merged model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from hrwkv.cli.display import Display
from hrwkv.cli.recipes import Command

EXAMPLES = """
hrwkv adapter merge model/ rwkv-lora.pth merged/ --scaling 0.5
hrwkv adapter merge model/ rwkv-bone.pth merged/
hrwkv adapter merge model/ peft-adapter/ merged/
"""


def build_app(epilogue: str) -> App:
    """The group of commands; epilogue: text with a place for examples."""
    help_epilogue = epilogue.format(examples=EXAMPLES.strip())
    app = App(name="adapter", help="Merge adapters into models.", help_epilogue=help_epilogue)
    command = Command(name="merge", help_epilogue=help_epilogue)
    command.default(merge)
    app.command(command)
    return app


def merge(
    model: Annotated[Path, Parameter(help="Model directory.")],
    adapter: Annotated[
        Path,
        Parameter(help="File or folder of LoRA, DoRA or Bone weights with RWKV names, or a PEFT directory."),
    ],
    out: Annotated[Path, Parameter(help="Directory to write; it must not exist.")],
    /,
    *,
    scaling: Annotated[
        float | None,
        Parameter(
            help="Factor of LoRA and DoRA with RWKV names, which no file tells; RWKVInside trains with 0.5, "
            "RWKV-Infer assumes 2.0. Bone and PEFT need none."
        ),
    ] = None,
) -> None:
    """Merge a LoRA, DoRA or Bone adapter into a model."""
    from hrwkv.convert.adapters import merge_adapter

    display = Display()
    with display.task("Merging", 1) as task:

        def report(name: str, number: int, total: int) -> None:
            task.advance(number, name, total=total)

        made = merge_adapter(model, adapter, out, scaling=scaling, report=report)
    display.line(
        f"{made.path}: weights with {adapter.resolve().name} merged: {made.merged}, "
        f"tensors replaced by its own: {made.replaced}"
    )
