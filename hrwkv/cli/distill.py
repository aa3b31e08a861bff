"""``hrwkv distill``: trains a converted student towards its teacher, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from hrwkv.cli.display import Display, Task, count, duration
from hrwkv.settings import DistillSettings

if TYPE_CHECKING:
    from hrwkv.distill.corpus import Corpus
    from hrwkv.distill.logs import Progress

EXAMPLES = """
hrwkv distill student/ --teacher teacher/ --stage all
hrwkv distill student/ --teacher teacher/ --stage 2 --recipe recipe.toml --stage2.tokens 1_000_000
hrwkv distill student/ --teacher teacher/ --out run/ --resume
torchrun --nproc-per-node 8 -m hrwkv.cli distill student/ --teacher teacher/ --dtype bfloat16
"""


def distill(
    student: Annotated[Path, Parameter(help="Directory that hrwkv convert wrote.")],
    /,
    *,
    teacher: Annotated[Path, Parameter(help="Directory of the teacher it was converted from.")],
    out: Annotated[
        Path | None,
        Parameter(help="Folder of the run: stage1/ to stage3/ and logs [default: STUDENT-distilled]."),
    ] = None,
    stage: Annotated[
        Literal["1", "2", "3", "all"],
        Parameter(
            help="1 aligns the mixers, 2 distils the model, 3 does so at long context; all is 1, 2, 3."
        ),
    ] = "all",
    resume: Annotated[bool, Parameter(help="Go on with an interrupted run in --out.", negative=())] = False,
    recipe: Annotated[
        str | None, Parameter(help="TOML file, or name of a shipped recipe; its [distill] is read.")
    ] = None,
    settings: Annotated[DistillSettings, Parameter(name="*", group="Recipe keys")] = DistillSettings(),  # noqa: B008 (frozen)
) -> None:
    """Train a student to give the teacher's probabilities, in up to three stages."""
    display = Display()
    out = out or student.with_name(f"{student.name}-distilled")
    stages = (1, 2, 3) if stage == "all" else (int(stage),)
    done = run_distill(display, student, teacher, out, settings, stages=stages, resume=resume)
    display.line(f"Next: hrwkv eval {done[max(done)]} --teacher {teacher}")


def run_distill(
    display: Display,
    student: Path,
    teacher: Path,
    out: Path,
    settings: DistillSettings,
    *,
    stages: tuple[int, ...],
    resume: bool = False,
    corpus: Corpus | None = None,
) -> dict[int, Path]:
    """Distil with a progress line and a line per validation; returns the directory of each stage.

    corpus: the text, where several runs share it; None reads it.
    """
    from hrwkv.distill.trainer import distill as train

    with Watcher(display) as watcher:
        done = train(
            student, teacher, out, settings, stages=stages, resume=resume, observer=watcher, corpus=corpus
        )
    for number in stages:
        display.line(f"Stage {number}: {done[number]}")
    return done


class Watcher:
    """Shows the steps of a distillation: one progress line per stage, one line per validation."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._task: Task | None = None
        self._stage = 0
        self._waiting = display.console.status("Reading the text and the models")

    def __enter__(self) -> Watcher:
        """Show that something happens before the first step."""
        self._waiting.start()
        return self

    def __exit__(self, *unused: object) -> None:
        """Take the line of the last stage away."""
        self._waiting.stop()
        if self._task is not None:
            self._task.__exit__()

    def __call__(self, progress: Progress) -> None:
        """Take in one step."""
        if self._task is None or progress.stage != self._stage:
            self.__exit__()
            self._stage = progress.stage
            self._task = self._display.task(f"Stage {progress.stage}", progress.steps).__enter__()
        self._task.advance(progress.step, _note(progress))
        if progress.validation is not None:
            self._task.say(_validation_line(progress))


def _note(progress: Progress) -> str:
    loss = f"loss {progress.loss:.4f}" if progress.kl is None else f"KL {progress.kl:.4f}"
    rate = f"{count(round(progress.tokens_per_second))} tokens/s"
    return f"{loss} | {rate} | {duration(progress.seconds_left)} left"


def _validation_line(progress: Progress) -> str:
    found = progress.validation
    assert found is not None
    ratio = found.student_perplexity / found.teacher_perplexity
    return (
        f"  stage {progress.stage} step {progress.step}/{progress.steps}, {count(progress.tokens)} tokens: "
        f"held-out KL {found.kl:.4f}, top-1 {found.agreement:.1%}, perplexity {found.student_perplexity:.3f} "
        f"({ratio:.3f} x the teacher's {found.teacher_perplexity:.3f})"
    )
