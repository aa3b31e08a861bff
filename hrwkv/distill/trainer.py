"""``distill``: runs the stages one after another, each from the directory that the one before wrote.

The trainer knows optimiser, budget, validation, logs and checkpoints; what a step computes stands in the
table of ``stages``. Metrics stay on the device and are read every few steps on a GPU, so that the host does
not wait for it. A run that is interrupted goes on from its last checkpoint with the same losses. Left out:
early stopping, averaging of weights, several micro-batches in one step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrwkv.distill.checkpointing import (
    Checkpoints,
    Recipe,
    check_recipe,
    remove_checkpoints,
    stage_recipe,
    write_json,
    write_model,
)
from hrwkv.distill.corpus import Corpus, read_corpus
from hrwkv.distill.frozen import EIGHT_BITS, Quantised, Shared, check_frozen
from hrwkv.distill.logs import Observer, Progress, Rate, RunLog, Validation
from hrwkv.distill.optimiser import (
    build_optimiser,
    optimiser_state,
    schedule_factor,
    set_learning_rate,
    trained_parameters,
)
from hrwkv.distill.parallel import Ranks, barrier, joined, local, open_model, start
from hrwkv.distill.stages import (
    STAGES,
    StepInput,
    StepOptions,
    StepResult,
    check_pair,
    split_rows,
    trains,
    validation_sums,
)
from hrwkv.model.checkpoint import load_config
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import read_json
from hrwkv.settings import DistillSettings

logger = logging.getLogger(__name__)

RECIPE, CHECKPOINTS = "recipe.json", "checkpoints"
# Steps between two looks at the metrics; each look makes the host wait for the device.
STEPS_PER_READ = {"cpu": 1, "cuda": 10}


def distill(
    student: Path,
    teacher: Path,
    out: Path,
    settings: DistillSettings,
    *,
    stages: Sequence[int],
    resume: bool,
    observer: Observer,
    corpus: Corpus | None = None,
) -> dict[int, Path]:
    """Run stages of a distillation and return the model directory of each.

    Args:
        student: a converted directory; where stage n - 1 stands in ``out``, stage n starts from that instead.
        teacher: the teacher's directory.
        out: receives stage1/, stage2/, stage3/ (model directories), log.jsonl, tensorboard/, recipe.json and,
        while a
            stage runs, checkpoints/.
        settings: the recipe.
        stages: which of 1, 2 and 3 to run, in rising order.
        resume: skip the stages that are complete and go on from the last checkpoint of the one that is not.
        observer: called by the first process after each step (on a GPU a few steps at once).
        corpus: what ``read_corpus`` made of the teacher and settings.data; None reads it here.

    Raises:
        ValueError: settings, data or models that do not fit each other, an output that is in use, a resume
        with another
            recipe, a loss or gradient that is not finite.
        CheckpointError: a model directory that cannot be read.
    """
    if not stages or list(stages) != sorted(set(stages) & STAGES.keys()):
        raise ValueError(f"stages are {list(stages)}, expected some of 1, 2, 3 in rising order")
    check_pair(load_config(student), load_config(teacher))
    with joined(settings.device) as ranks:
        if settings.dtype == "bfloat16" and ranks.device.type == "cpu":
            raise ValueError(
                "dtype is 'bfloat16' on a CPU, where it is up to 100 times slower: use float32 there"
            )
        recipes = _open_output(out, stages, resume=resume)
        for number in stages:
            if str(number) in recipes:
                recipe = stage_recipe(
                    settings, number, student=_source(student, out, number), teacher=teacher
                )
                check_recipe(recipe, recipes[str(number)], where=out)
        barrier(ranks)
        paths = {number: out / f"stage{number}" for number in stages}
        if ranks.is_first:
            remove_checkpoints(out / CHECKPOINTS, [number for number in stages if paths[number].exists()])
        missing = [number for number in stages if not paths[number].exists()]
        if missing:
            run = _Run(teacher, out, settings, ranks=ranks, observer=observer, corpus=corpus)
            for number in missing:
                run.stage(number, source=_source(student, out, number), recipes=recipes)
        return paths


def _source(student: Path, out: Path, number: int) -> Path:
    before = out / f"stage{number - 1}"
    return before if before.exists() else student


def _open_output(out: Path, stages: Sequence[int], *, resume: bool) -> dict[str, Recipe]:
    """The recipes of the stages that ``out`` has begun; {} for a new directory."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if resume:
            raise ValueError(f"there is nothing to resume in {out}: leave out --resume to start")
        return {}
    if not (out / RECIPE).exists():
        raise ValueError(f"{out} exists and is no distillation: choose another output or remove it first")
    recipes = read_json(out / RECIPE)
    begun = [number for number in stages if str(number) in recipes]
    if begun and not resume:
        raise ValueError(
            f"{out} has already begun stage {begun[0]}: go on with --resume or choose another output"
        )
    return recipes


class _Run:
    """What the stages of one call share: the teacher, the text, the output directory."""

    def __init__(
        self,
        teacher: Path,
        out: Path,
        settings: DistillSettings,
        *,
        ranks: Ranks,
        observer: Observer,
        corpus: Corpus | None,
    ) -> None:
        self.out, self.settings, self.ranks, self.observer = out, settings, ranks, observer
        self.teacher_path = teacher
        self.dtype = getattr(torch, settings.dtype)
        self.corpus = corpus or read_corpus(teacher, settings.data)
        narrow = EIGHT_BITS.get(settings.frozen_dtype)
        if narrow is not None and ranks.world > 1:
            raise ValueError(
                f"frozen_dtype is {settings.frozen_dtype!r} with {ranks.world} processes, where weights are "
                "sharded: use bfloat16, or one process"
            )
        self.teacher = open_model(
            teacher,
            ranks,
            dtype=self.dtype,
            fitting=None if narrow is None else Quantised(narrow, ranks.device),
        )

    def stage(self, number: int, *, source: Path, recipes: dict[str, Recipe]) -> None:
        """Run one stage, from its last checkpoint if there is one, and write its model directory."""
        recipe = stage_recipe(self.settings, number, student=source, teacher=self.teacher_path)
        stage = _StageRun(self, number, source=source, recipe=recipe)
        recipes[str(number)] = recipe
        if self.ranks.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / RECIPE, recipes)
        stage.train()
        write_model(stage.engine, self.out / f"stage{number}", source=source)
        if self.ranks.is_first:
            remove_checkpoints(self.out / CHECKPOINTS, [number])

    def open_student(self, path: Path, number: int) -> HybridModel:
        """The student of a stage on this process's device, with gradients for what trains in it."""
        torch.manual_seed(self.settings.seed)
        stage, mode, unread = STAGES[number], self.settings.mode, load_config(path).unread_parameters
        shares = mode == "frozen-mlp"
        if shares and self.ranks.world > 1:
            check_frozen(path, self.teacher_path, ranks=self.ranks, dtype=self.dtype)
        student = open_model(
            path,
            self.ranks,
            dtype=self.dtype,
            trains=lambda name: trains(name, stage=stage, mode=mode, unread=unread),
            kind=self.settings.parallel,
            fitting=Shared(self.teacher) if shares else None,
        )
        student.model.gradient_checkpointing = (
            number != 1 and self.settings.stage(number).gradient_checkpointing
        )
        student.model.keep = self.settings.stage(number).keep
        return student.train()


class _StageRun:
    """One stage: steps, and the looks up from them."""

    def __init__(self, run: _Run, number: int, *, source: Path, recipe: Recipe) -> None:
        self.run, self.number, self.source = run, number, source
        self.settings, self.ranks, self.table = run.settings.stage(number), run.ranks, STAGES[number]
        self.steps = run.settings.steps(number)
        self.batch_tokens = run.settings.batch_tokens(number)
        self.stream = run.corpus.stream(run.settings, number)
        self._split(self.stream.batch(0))  # refuses a batch that cannot be divided before anything is written
        self.checkpoints = Checkpoints(run.out / CHECKPOINTS, self.ranks, recipe=recipe)
        self.begun = self.checkpoints.latest(number)
        path = source if self.begun is None else self.begun.model
        self.student = run.open_student(path, number)
        self.engine = start(
            self.student,
            build_optimiser(self.student, self.settings),
            self.ranks,
            kind=run.settings.parallel,
            dtype=run.dtype,
            path=path,
            read_state=optimiser_state,
            reduce_always=run.settings.reduce_each_micro_batch,
        )
        self.options = StepOptions(
            self.ranks,
            kl_weight=self.settings.kl_weight,
            ce_weight=self.settings.ce_weight,
            hidden_weight=self.settings.hidden_weight,
            dtype=run.dtype,
            backward=self.engine.backward,
        )
        self._dev: list[StepInput] | None = None

    def train(self) -> None:
        """Train from the last checkpoint to the end of the budget."""
        done = 0
        if self.begun is not None:
            self.engine.load_moments(self.begun.moments)
            done = self.begun.step
        reporter = _Reporter(self, done)
        try:
            for step in range(done + 1, self.steps + 1):
                reporter.add(step, *self._step(step))
                last = step == self.steps
                validates = last or _is_due(step, self.run.settings.validate_every)
                saves = not last and _is_due(step, self.run.settings.checkpoint_every)
                if validates or saves or step % STEPS_PER_READ[self.ranks.device.type] == 0:
                    reporter.read(self._validate() if validates else None)
                if saves:
                    self.checkpoints.save(self.number, step, self.engine, source=self.source)
        finally:
            reporter.close()

    def _split(self, batch: tuple[Tensor, Any]) -> StepInput:
        context_length = self.run.settings.context_length(self.number)
        return split_rows(*batch, context_length=context_length, ranks=self.ranks)

    def _step(self, step: int) -> tuple[StepResult, Tensor, float]:
        """One optimiser step (the first is 1): its result, gradient norm [] and learning rate."""
        factor = schedule_factor(
            step - 1,
            steps=self.steps,
            warmup_ratio=self.settings.warmup_ratio,
            final_ratio=self.settings.final_lr_ratio,
        )
        set_learning_rate(self.engine.optimiser, factor)
        inputs = self._split(self.stream.batch(step - 1))
        with self.engine.micro_batch(last=True):
            result = self.table.step(self.run.teacher, self.student, inputs, self.options)
        return result, self.engine.step(self.settings.clip), factor * self.settings.learning_rate

    def _validate(self) -> Validation:
        """Measure on the fixed batches of the dev split."""
        if self._dev is None:
            batches = self.run.corpus.validation_batches(self.run.settings, self.number)
            self._dev = [self._split(batch) for batch in batches]
        self.student.eval()
        sums = [validation_sums(self.run.teacher, self.student, inputs, self.options) for inputs in self._dev]
        self.student.train()
        tokens = sum(inputs.num_tokens for inputs in self._dev)
        labels = sum(inputs.num_labels for inputs in self._dev)
        return Validation(
            kl=sum(float(part.kl) for part in sums) / tokens,
            agreement=sum(float(part.agreement) for part in sums) / tokens,
            student_perplexity=_perplexity(sum(float(part.student_nll) for part in sums) / labels),
            teacher_perplexity=_perplexity(sum(float(part.teacher_nll) for part in sums) / labels),
        )


class _Reporter:
    """Holds the metrics of the last steps on the device, reads them at once, checks and reports them."""

    def __init__(self, stage: _StageRun, done: int) -> None:
        self.stage, self.done = stage, done
        self.log = RunLog(stage.run.out, stage=stage.number, done=done) if stage.ranks.is_first else None
        self.rate = Rate()
        self.waiting: list[tuple[int, float, Tensor]] = []

    def add(self, step: int, result: StepResult, norm: Tensor, learning_rate: float) -> None:
        """Keep a step's metrics as one tensor, unread."""
        values = [result.loss, norm]
        if result.kl is not None and result.agreement is not None:
            values += [result.kl, result.agreement]
        if result.layer_loss is not None:
            values += result.layer_loss.unbind()
        self.waiting.append((step, learning_rate, torch.stack([value.float() for value in values])))

    def read(self, validation: Validation | None) -> None:
        """Report the kept steps; the validation belongs to the last of them."""
        rows = torch.stack([values for _, _, values in self.waiting]).tolist()
        tokens_done = (self.waiting[-1][0] - self.done) * self.stage.batch_tokens
        rate = self.rate.update(tokens_done)
        for (step, learning_rate, _), row in zip(self.waiting, rows, strict=True):
            self._check(step, row)
            is_last = step == self.waiting[-1][0]
            self._report(step, row, learning_rate, rate, validation if is_last else None)
        self.waiting.clear()

    def _report(
        self, step: int, row: list[float], learning_rate: float, rate: float, validation: Validation | None
    ) -> None:
        stage, aligns = self.stage, self.stage.table.mixers_only
        if self.log is None:
            return
        progress = Progress(
            stage=stage.number,
            step=step,
            steps=stage.steps,
            tokens=step * stage.batch_tokens,
            loss=row[0],
            kl=None if aligns else row[2],
            agreement=None if aligns else row[3],
            tokens_per_second=rate,
            seconds_left=(stage.steps - step) * stage.batch_tokens / rate,
            learning_rate=learning_rate,
            grad_norm=row[1],
            layer_loss=tuple(row[2:]) if aligns else (),
            validation=validation,
        )
        self.log.write(progress)
        stage.run.observer(progress)

    def _check(self, step: int, row: list[float]) -> None:
        """Raise ValueError if a loss or the gradient of this step is not finite."""
        if all(map(math.isfinite, row)):
            return
        if self.stage.table.mixers_only and not math.isfinite(row[0]):
            layers = [str(layer) for layer, loss in enumerate(row[2:]) if not math.isfinite(loss)]
            what = f"the loss of layer {', '.join(layers)}"
        elif not math.isfinite(row[0]):
            what = "the loss"
        else:
            what = f"the gradient ({_first_bad_gradient(self.stage.student)})"
        raise ValueError(
            f"stage {self.stage.number}, step {step}: {what} is not finite; lower the learning rate, or "
            "resume from the last checkpoint if this was a fault of the machine"
        )

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()


def _perplexity(nll: float) -> float:
    return (
        math.exp(nll) if nll < 700 else math.inf
    )  # exp of more is an OverflowError, and a run may be that bad


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _first_bad_gradient(student: HybridModel) -> str:
    for name, parameter in trained_parameters(student):
        if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
            return name
    return "its norm overflows"
