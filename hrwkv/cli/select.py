"""``hrwkv select``: which layers stay attention, between stage 1 and stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hrwkv.cli.display import Display, duration
from hrwkv.settings import SelectSettings

if TYPE_CHECKING:
    from hrwkv.distill.select import SelectProgress
    from hrwkv.distill.selection import Selection

EXAMPLES = """
hrwkv select run/stage1 --teacher teacher/ --keep 6 --out student2/
hrwkv select run/stage1 --teacher teacher/ --keep 6 --method greedy --out student2/
hrwkv select run/stage1 --teacher teacher/ --layers 8,15,22,29,36,43 --out student2/
"""


def select(
    student: Annotated[Path, Parameter(help="Directory of stage 1, every layer RWKV.")],
    /,
    *,
    teacher: Annotated[Path, Parameter(help="Directory of the teacher that it was trained with.")],
    out: Annotated[
        Path | None, Parameter(help="Directory to write; it must not exist [default: STUDENT-selected].")
    ] = None,
    settings: Annotated[SelectSettings | None, Parameter(name="*", group="Recipe keys")] = None,
    recipe: Annotated[
        str | None, Parameter(help="TOML file, or name of a shipped recipe; its [select] is read.")
    ] = None,
) -> None:
    """Choose the layers that stay attention, by what each of them is worth; nothing trains.

    Writes the student with the teacher's attention in those layers, ready for stage 2, with the scores as
    selection.json and selection.png. An interrupted selection goes on when it is called again.
    """
    display = Display()
    out = out or student.with_name(f"{student.name}-selected")
    run_select(display, student, teacher, out, settings or SelectSettings())
    display.line(f"Next: hrwkv distill {out} --teacher {teacher} --stage 2")


def run_select(
    display: Display, student: Path, teacher: Path, out: Path, settings: SelectSettings
) -> Selection:
    """Select with a progress line, and show the scores."""
    from hrwkv.cli.loading import choose_device
    from hrwkv.distill.select import select as choose

    device = choose_device(settings.device)
    if settings.dtype == "bfloat16" and device == "cpu":
        raise ValueError(
            "dtype is 'bfloat16' on a CPU, where it is up to 100 times slower: use float32 there"
        )
    with display.task("Selecting", 1) as task:

        def observe(progress: SelectProgress) -> None:
            where = "no layer swapped" if progress.layer is None else f"layer {progress.layer}"
            note = f"{where} | {duration(progress.seconds_left)} left"
            task.advance(progress.done, note, total=progress.total)

        found = choose(student, teacher, out, settings, device=device, observer=observe)
    if found.base is not None:
        _show(display, found)
    display.line(f"{out}: attention in layers {', '.join(map(str, found.layers))} ({found.method})")
    return found


def _show(display: Display, found: Selection) -> None:
    """One row a layer: its score, then the scores of the model with it swapped, by task."""
    assert found.base is not None
    header = ["layer", "score", "KL", *(f"{task} nll" for task in found.base)]
    base = ["none swapped", "", f"{found.base['text'].kl:.4f}"]
    rows = [[*base, *(f"{score.nll:.4f}" for score in found.base.values())]]
    for row in found.rows:
        name = f"{row.layer} attention" if row.layer in found.layers else str(row.layer)
        nlls = [f"{score.nll:.4f}" for score in row.tasks.values()]
        rows.append([name, f"{row.score:.4f}", f"{row.tasks['text'].kl:.4f}", *nlls])
    by = f"{found.method} ({', '.join(found.tasks)})" if found.tasks else found.method
    display.table(f"Layers by {by}; nll and KL in nats per token", header, rows)
