"""``hrwkv distill``: trains a converted student towards its teacher, or goes the whole way from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from hrwkv.cli.display import Display, Task, count, duration
from hrwkv.cli.interrupt import Stopped, StopSignal, told_once
from hrwkv.settings import ConvertSettings, DistillSettings, EvalSettings, SelectSettings

if TYPE_CHECKING:
    from hrwkv.distill.corpus import Corpus
    from hrwkv.distill.logs import Progress

EXAMPLES = """
hrwkv distill teacher/ --select.keep 6 --out run/
hrwkv distill --recipe reka-flash-3 --out run/
hrwkv distill student/ --teacher teacher/ --stage 2 --recipe recipe.toml --stage2.tokens 1_000_000
hrwkv distill student/ --teacher teacher/ --out run/ --resume
torchrun --nproc-per-node 8 -m hrwkv.cli distill student/ --teacher teacher/ --dtype bfloat16
"""
Left = Callable[["Progress"], float]


def distill(
    model: Annotated[
        Path | None,
        Parameter(
            help="Directory that hrwkv convert wrote, with --teacher; or the teacher's, for all steps."
        ),
    ] = None,
    /,
    *,
    teacher: Annotated[
        Path | None, Parameter(help="Directory of the teacher that MODEL was converted from.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Folder of the run: models and logs [default: MODEL-distilled].")
    ] = None,
    stage: Annotated[
        Literal["1", "2", "3", "all"],
        Parameter(
            help="1 aligns the mixers, 2 distils the model, 3 does so at long context; all is 1, 2, 3."
        ),
    ] = "all",
    resume: Annotated[bool, Parameter(help="Go on with an interrupted run in --out.", negative=())] = False,
    recipe: Annotated[
        str | None,
        Parameter(
            help="TOML file, or name of a shipped recipe; [distill], [convert], [select], [eval] are read."
        ),
    ] = None,
    settings: Annotated[DistillSettings, Parameter(name="*", group="Recipe keys")] = DistillSettings(),  # noqa: B008 (frozen)
    convert: ConvertSettings | None = None,
    select: SelectSettings | None = None,
    eval: EvalSettings = EvalSettings(),  # noqa: A002, B008 (the command's name; frozen)
) -> None:
    """Train a student to give the teacher's probabilities, in up to three stages.

    Without --teacher, MODEL is a teacher and every step is taken: convert, stage 1, select, stages 2 and 3,
    eval. The same command with --resume goes on where an interruption left it.
    """
    from hrwkv.cli.pipeline import Pipeline, find_teacher
    from hrwkv.distill.parallel import joined

    display = Display()
    if model is None or teacher is None:
        if stage != "all":
            raise ValueError(f"--stage is {stage} without --teacher: give the student and its teacher")
        found = find_teacher(model, teacher, settings.base_model)
        out = out or Path(f"{found.resolve().name}-distilled")
        Pipeline(display, found, out, settings, convert=convert, select=select, eval=eval).run(resume=resume)
        return
    out = out or model.with_name(f"{model.name}-distilled")
    stages = (1, 2, 3) if stage == "all" else (int(stage),)
    with joined(settings.device) as ranks, told_once(ranks):
        display.console.quiet = not ranks.is_first
        with StopSignal(display) as stop:
            done = run_distill(
                display, model, teacher, out, settings, stages=stages, resume=resume, stop=stop
            )
        if ranks.is_first:
            run_card(display, out, done[max(done)], teacher=teacher, base_model=settings.base_model)
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
    stop: Callable[[], bool] = lambda: False,
    left: Left | None = None,
) -> dict[int, Path]:
    """Distil with a progress line and a line per validation; returns the directory of each stage.

    corpus: the text, where several runs share it; None reads it. stop: see ``distill.trainer``. left: seconds
    that are left of more than this. Raises Stopped when ``stop`` has ended the run.
    """
    from hrwkv.distill.loop import RunStoppedError
    from hrwkv.distill.trainer import distill as train

    try:
        with Watcher(display, left) as watcher:
            done = train(
                student,
                teacher,
                out,
                settings,
                stages=stages,
                resume=resume,
                observer=watcher,
                corpus=corpus,
                stop=stop,
            )
    except RunStoppedError as error:
        raise Stopped(str(error)) from error
    for number in stages:
        display.line(f"Stage {number}: {done[number]}")
    return done


def run_card(display: Display, out: Path, model: Path, *, teacher: Path, base_model: str) -> None:
    """Write the model card of a run that is complete."""
    from hrwkv.distill.report import write_card

    written = write_card(out, model, teacher=teacher, base_model=base_model or teacher.resolve().name)
    display.line(f"Written: {', '.join(str(path) for path in written)}")


class Watcher:
    """Shows the steps of a distillation: one progress line per stage, one line per validation.

    left: seconds that are left of the whole, for a run that is a part of more.
    """

    def __init__(self, display: Display, left: Left | None = None) -> None:
        self._display, self._left = display, left
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
        self._task.advance(progress.step, self._note(progress))
        if progress.skipped:
            where = f"  stage {progress.stage} step {progress.step}"
            self._task.say(f"{where}: loss {progress.loss:.4f}, left out as a spike")
        if progress.validation is not None:
            self._task.say(_validation_line(progress))

    def _note(self, progress: Progress) -> str:
        loss = f"loss {progress.loss:.4f}" if progress.kl is None else f"KL {progress.kl:.4f}"
        rate = f"{count(round(progress.tokens_per_second))} tokens/s"
        whole = "" if self._left is None else f" | about {duration(self._left(progress))} in all"
        return f"{loss} | {rate} | {duration(progress.seconds_left)} left{whole}"


def _validation_line(progress: Progress) -> str:
    found = progress.validation
    assert found is not None
    ratio = found.student_perplexity / found.teacher_perplexity
    passkey = "" if found.passkey is None else f", passkey {found.passkey:.0%} ({found.teacher_passkey:.0%})"
    return (
        f"  stage {progress.stage} step {progress.step}/{progress.steps}, {count(progress.tokens)} tokens: "
        f"held-out KL {found.kl:.4f}, top-1 {found.agreement:.1%}, perplexity {found.student_perplexity:.3f} "
        f"({ratio:.3f} x the teacher's {found.teacher_perplexity:.3f}){passkey}"
    )
