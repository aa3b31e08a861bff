"""The whole way from a teacher to a measured student, in steps that speak through directories.

convert (every layer RWKV), stage 1, select, stages 2 and 3, eval, and the model card. A step is complete when
what it writes is there, since every writer renames at the end; so a run that was interrupted anywhere skips
what is complete and goes on inside the step that is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrwkv.cli.convert import run_convert
from hrwkv.cli.display import Display
from hrwkv.cli.distill import run_card, run_distill
from hrwkv.cli.evaluate import run_eval
from hrwkv.cli.interrupt import Stopped, StopSignal, told_once
from hrwkv.cli.select import run_select
from hrwkv.settings import ConvertSettings, DistillSettings, EvalSettings, SelectSettings

if TYPE_CHECKING:
    from hrwkv.distill.corpus import Corpus
    from hrwkv.distill.logs import Progress

FACTS = "pipeline"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Step:
    """One step: complete when ``done`` exists; ``together`` if every process of torchrun takes part."""

    title: str
    done: Path
    run: Callable[[], Any]
    together: bool = False


class Pipeline:
    """All steps of one teacher into one folder. Raises ValueError for settings that do not fit each other."""

    def __init__(
        self,
        display: Display,
        teacher: Path,
        out: Path,
        settings: DistillSettings,
        *,
        convert: ConvertSettings | None,
        select: SelectSettings | None,
        eval: EvalSettings,  # noqa: A002 (the command's name)
    ) -> None:
        self.display, self.teacher, self.out, self.settings = display, teacher, out, settings
        self.select = selection_of(convert, select, teacher)
        without = convert or ConvertSettings(keep_attention=0)
        self.convert = replace(without, attention_layers=None, keep_attention=0)
        self.eval = eval

    @cached_property
    def corpus(self) -> Corpus:
        """The text, read when the first stage needs it."""
        from hrwkv.distill.corpus import read_corpus

        return read_corpus(self.teacher, self.settings.data)

    def run(self, *, resume: bool) -> None:
        """Take every step that is not complete.

        Raises ValueError for a folder that is in use or has other settings, Stopped for an interruption.
        """
        from hrwkv.distill.checkpointing import claimed
        from hrwkv.distill.parallel import barrier, joined

        with joined(self.settings.device) as ranks, told_once(ranks), claimed(self.out, ranks):
            self.display.console.quiet = not ranks.is_first
            facts = self._facts()
            begins = self._begins(facts, resume=resume)
            barrier(ranks)  # all have looked before one writes
            if begins and ranks.is_first:
                self._begin(facts)
            steps = self.steps()
            try:
                for number, step in enumerate(steps, 1):
                    self._take(step, f"Step {number} of {len(steps)}, {step.title}", first=ranks.is_first)
            except Stopped:
                raise
            except KeyboardInterrupt as error:
                raise Stopped("interrupted") from error
            if ranks.is_first:
                self._finish()

    def steps(self) -> list[Step]:
        """The steps in order."""
        out = self.out
        found = [Step("convert", out / "converted", self._convert), self._stage(1)]
        if self.select is not None:
            found.append(Step("select", out / "selected", self._select))
        found += [self._stage(2), self._stage(3)]
        return [*found, Step("eval", out / "eval" / "report.md", self._eval)]

    def _take(self, step: Step, title: str, *, first: bool) -> None:
        if step.done.exists():
            self.display.line(f"{title}: complete", "dim")
        elif first or step.together:
            with self.display.step(title):
                step.run()
        else:
            # What the first process does alone may take hours, longer than a collective waits.
            while not step.done.exists():
                time.sleep(POLL_SECONDS)

    def _stage(self, number: int) -> Step:
        return Step(
            f"stage {number}", self.out / f"stage{number}", lambda: self._train(number), together=True
        )

    def _convert(self) -> None:
        run_convert(self.display, self.teacher, self.out / "converted", self.convert)

    def _train(self, number: int) -> None:
        with StopSignal(self.display) as stop:
            run_distill(
                self.display,
                self.out / "converted",
                self.teacher,
                self.out,
                self.settings,
                stages=(number,),
                resume=True,
                corpus=self.corpus,
                stop=stop,
                left=self._left,
            )
            if stop():
                raise Stopped(f"stopped after stage {number}")

    def _select(self) -> None:
        assert self.select is not None
        run_select(self.display, self.out / "stage1", self.teacher, self.out / "selected", self.select)

    def _eval(self) -> None:
        run_eval(self.display, self.out / "stage3", self.teacher, self.out / "eval", self.eval)

    def _finish(self) -> None:
        model, name = self.out / "stage3", self.settings.base_model
        run_card(self.display, self.out, model, teacher=self.teacher, base_model=name)
        self.display.line(f"Next: hrwkv chat {model}")

    def _left(self, progress: Progress) -> float:
        """Seconds left of this stage and those after it, which take their operations at the same speed."""
        seconds = progress.seconds_left
        for number in range(progress.stage + 1, 4):
            tokens = self.settings.steps(number) * self.settings.batch_tokens(number)
            dearer = self._operations(number) / self._operations(progress.stage)
            seconds += tokens * dearer / progress.tokens_per_second
        return seconds

    def _operations(self, stage: int) -> float:
        from hrwkv.model.checkpoint import load_config
        from hrwkv.model.flops import stage_operations

        return stage_operations(
            load_config(self.out / "converted"),
            load_config(self.teacher),
            stage=stage,
            mode=self.settings.mode,
            context_length=self.settings.context_length(stage),
        )

    def _begin(self, facts: dict[str, Any]) -> None:
        from hrwkv.distill.checkpointing import write_json
        from hrwkv.distill.trainer import RECIPE

        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / RECIPE, {FACTS: facts})

    def _begins(self, facts: dict[str, Any], *, resume: bool) -> bool:
        """True for a new folder; in one that goes on, what decides the models must be what it was."""
        from hrwkv.distill.checkpointing import check_recipe
        from hrwkv.distill.trainer import RECIPE, check_begun
        from hrwkv.model.shards import read_json

        record = self.out / RECIPE
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return True
        recipes = read_json(record) if record.exists() else {}
        known = recipes.get(FACTS)
        if known is None:
            raise ValueError(f"{self.out} exists and is no run of all steps: choose another --out")
        if not resume:
            raise ValueError(f"{self.out} has already begun: go on with --resume or choose another --out")
        check_recipe(facts, known, where=self.out)
        converted = self.out / "converted"
        check_begun(converted, self.teacher, self.out, self.settings, stages=(1, 2, 3), recipes=recipes)
        return False

    def _facts(self) -> dict[str, Any]:
        """What decides converted and selected models, as flat names, through JSON like what is read back."""
        from hrwkv.distill.checkpointing import model_fingerprint

        parts = {
            "convert": asdict(self.convert),
            "select": asdict(self.select) if self.select else {},
            "teacher": model_fingerprint(self.teacher),
        }
        flat = {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}
        facts: dict[str, Any] = json.loads(json.dumps(flat))
        return facts


def selection_of(
    convert: ConvertSettings | None, select: SelectSettings | None, teacher: Path
) -> SelectSettings | None:
    """How layers are chosen after stage 1: as [select] says, else those of [convert]; None keeps none.

    Raises ValueError where neither says anything, or names a layer that the teacher does not have.
    """
    from hrwkv.model.checkpoint import load_config

    if select is None and convert is None:
        raise ValueError(
            "no layers are chosen: give --select.keep N, --convert.attention-layers 8,15,22, or a recipe "
            "with [select] or [convert]"
        )
    if select is None and convert is not None:
        if convert.attention_layers:
            select = SelectSettings(layers=convert.attention_layers)
        elif convert.keep_attention:
            select = SelectSettings(keep=convert.keep_attention, method="even")
    count = load_config(teacher).num_hidden_layers
    if select is not None and max(select.layers or (select.keep or 0,)) >= count:
        raise ValueError(
            f"layers to keep are {select.layers or select.keep}, the teacher has {count}: fewer must stay"
        )
    return select


def find_teacher(model: Path | None, teacher: Path | None, base_model: str) -> Path:
    """The teacher's directory: as given, or what ``base_model`` names, also in the hub's local cache.

    Raises ValueError if there is none, or if ``model`` is a student whose teacher is not given.
    """
    from hrwkv.model.checkpoint import load_config

    given = model or teacher or (Path(base_model) if base_model else None)
    if given is None:
        raise ValueError("no model is given: name the teacher's directory, or a recipe with base_model")
    if given.is_dir():
        if load_config(given).linear_layers:
            raise ValueError(f"{given} has RWKV layers, so it is a student: give --teacher as well")
        return given
    if given != Path(base_model):
        raise ValueError(f"{given} is no directory: expected the teacher's")
    return _cached(base_model)


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base_model {name!r} is no directory and not in the hub's cache: hf download {name}, or "
            "name the teacher's directory"
        ) from error
