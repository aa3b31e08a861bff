"""``distill``: runs the stages one after another, each from the directory that the one before wrote.

The trainer opens what a stage works with and knows which directory leads to which; the steps are in ``loop``,
and what a step computes stands in the table of ``stages``. A run that is interrupted goes on from its last
checkpoint with the same losses. Left out: early stopping, averaging of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hrwkv.distill.checkpointing import (
    Checkpoints,
    Recipe,
    check_recipe,
    claimed,
    remove_checkpoints,
    stage_recipe,
    write_json,
    write_model,
)
from hrwkv.distill.corpus import Corpus, open_tokenizer, read_corpus
from hrwkv.distill.frozen import EIGHT_BITS, Quantised, Shared, check_frozen
from hrwkv.distill.guard import Attempt, RestartError
from hrwkv.distill.logs import Observer
from hrwkv.distill.loop import RunStoppedError, StageLoop, StageParts, anywhere, micro_batches
from hrwkv.distill.optimiser import build_optimiser, optimiser_state
from hrwkv.distill.parallel import Ranks, barrier, joined, open_model, start
from hrwkv.distill.stages import (
    STAGES,
    StepInput,
    StepOptions,
    check_pair,
    trains,
)
from hrwkv.distill.validation import Validator, passkey_samples
from hrwkv.model.checkpoint import load_config
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import read_json
from hrwkv.settings import DistillSettings

RECIPE, CHECKPOINTS, SELECTED = "recipe.json", "checkpoints", "selected"


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
    stop: Callable[[], bool] = lambda: False,
) -> dict[int, Path]:
    """Run stages of a distillation and return the model directory of each.

    Args:
        student: a converted directory; where stage n - 1 stands in ``out``, stage n starts from that instead,
            and stage 2 from ``out``/selected where a selection stands there.
        teacher: the teacher's directory.
        out: receives stage1/, stage2/, stage3/ (model directories), log.jsonl, tensorboard/, recipe.json and,
            while a stage runs, checkpoints/.
        settings: the recipe.
        stages: which of 1, 2 and 3 to run, in rising order.
        resume: skip the stages that are complete and go on from the last checkpoint of the one that is not.
        observer: called by the first process after each step (on a GPU a few steps at once).
        corpus: what ``read_corpus`` made of the teacher and settings.data; None reads it here.
        stop: asked after each step (by several processes, or on a GPU, a few steps apart); True ends the run
            with a checkpoint.

    Raises:
        ValueError: settings, data or models that do not fit each other, an output that is in use, a resume
            with another recipe, a loss or gradient that is not finite, too many spikes.
        RunStoppedError: ``stop`` said so, and the checkpoint is written.
        CheckpointError: a model directory that cannot be read.
    """
    if not stages or list(stages) != sorted(set(stages) & STAGES.keys()):
        raise ValueError(f"stages are {list(stages)}, expected some of 1, 2, 3 in rising order")
    check_pair(load_config(student), load_config(teacher))
    with joined(settings.device) as ranks, claimed(out, ranks):
        if settings.dtype == "bfloat16" and ranks.device.type == "cpu":
            raise ValueError(
                "dtype is 'bfloat16' on a CPU, where it is up to 100 times slower: use float32 there"
            )
        recipes = _open_output(out, stages, resume=resume)
        check_begun(student, teacher, out, settings, stages=stages, recipes=recipes)
        barrier(ranks)
        paths = {number: out / f"stage{number}" for number in stages}
        if ranks.is_first:
            remove_checkpoints(out / CHECKPOINTS, [number for number in stages if paths[number].exists()])
        missing = [number for number in stages if not paths[number].exists()]
        if missing:
            run = _Run(teacher, out, settings, ranks=ranks, observer=observer, corpus=corpus, stop=stop)
            for number in missing:
                run.stage(number, source=_source(student, out, number), recipes=recipes)
                if number != missing[-1] and anywhere(stop(), ranks):
                    raise RunStoppedError(f"stopped after stage {number}")
        return paths


def check_begun(
    student: Path,
    teacher: Path,
    out: Path,
    settings: DistillSettings,
    *,
    stages: Sequence[int],
    recipes: dict[str, Recipe],
) -> None:
    """Raise ValueError where a stage that ``out`` has begun or finished had another recipe.

    recipes: those that ``out`` holds, by stage.
    """
    for number in stages:
        if str(number) in recipes:
            source = _source(student, out, number)
            recipe = stage_recipe(settings, number, student=source, teacher=teacher)
            check_recipe(recipe, recipes[str(number)], where=out)


def _source(student: Path, out: Path, number: int) -> Path:
    selected = [out / SELECTED] if number == 2 else []
    found = [path for path in (*selected, out / f"stage{number - 1}") if path.exists()]
    return found[0] if found else student


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
        stop: Callable[[], bool],
    ) -> None:
        self.out, self.settings, self.ranks = out, settings, ranks
        self.observer, self.stop = observer, stop
        self.teacher_path = teacher
        self.dtype = getattr(torch, settings.dtype)
        self.corpus = corpus or read_corpus(teacher, settings.data)
        self.tokenizer = open_tokenizer(teacher)
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
        self._dev(number)  # refuses what cannot be divided before anything is written
        recipes[str(number)] = recipe
        if self.ranks.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / RECIPE, recipes)
        attempt: Attempt | None = Attempt()
        while attempt is not None:
            attempt = self._attempt(number, attempt, source=source, recipe=recipe)
        if self.ranks.is_first:
            remove_checkpoints(self.out / CHECKPOINTS, [number])

    def _attempt(self, number: int, attempt: Attempt, *, source: Path, recipe: Recipe) -> Attempt | None:
        """Run a stage to its end and write its model; or the attempt that must come after this one.

        A function of its own, so that one attempt's student is gone before the next one's is opened.
        """
        checkpoints = Checkpoints(self.out / CHECKPOINTS, self.ranks, recipe=recipe)
        begun = checkpoints.latest(number)
        parts = self._open(number, checkpoints, begun.model if begun else source, source=source)
        try:
            StageLoop(parts, begun, attempt).train()
        except RestartError as error:
            return error.attempt
        write_model(parts.engine, self.out / f"stage{number}", source=source)
        return None

    def _open(self, number: int, checkpoints: Checkpoints, path: Path, *, source: Path) -> StageParts:
        """The student in ``path`` with optimiser, data and validation."""
        settings, stage = self.settings, self.settings.stage(number)
        student = self.open_student(path, number)
        engine = start(
            student,
            build_optimiser(student, stage),
            self.ranks,
            kind=settings.parallel,
            dtype=self.dtype,
            path=path,
            read_state=optimiser_state,
            reduce_always=settings.reduce_each_micro_batch,
        )
        options = StepOptions(
            self.ranks,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
            hidden_weight=stage.hidden_weight,
            dtype=self.dtype,
            backward=engine.backward,
        )
        samples = passkey_samples(self.tokenizer, self.corpus, settings, stage=number, ranks=self.ranks)
        return StageParts(
            number=number,
            settings=settings,
            teacher=self.teacher,
            engine=engine,
            options=options,
            stream=self.corpus.stream(settings, number, pin=self.ranks.device.type == "cuda"),
            validator=Validator(self.teacher, options, self._dev(number), samples),
            checkpoints=checkpoints,
            source=source,
            out=self.out,
            observer=self.observer,
            stop=self.stop,
        )

    def _dev(self, number: int) -> list[list[StepInput]]:
        """The validation's batches, each as this process's micro-batches."""
        settings, ranks = self.settings, self.ranks
        tokens, length = settings.stage(number).micro_batch_tokens, settings.context_length(number)
        return [
            micro_batches(*batch, context_length=length, tokens=tokens, ranks=ranks)
            for batch in self.corpus.validation_batches(settings, number)
        ]

    def open_student(self, path: Path, number: int) -> HybridModel:
        """The student of a stage on this process's device, with gradients for what trains in it."""
        torch.manual_seed(self.settings.seed)
        stage, mode, unread = STAGES[number], self.settings.mode, load_config(path).unread_parameters
        frozen = mode == "frozen-mlp"
        if frozen and self.ranks.world > 1:
            check_frozen(path, self.teacher_path, ranks=self.ranks, dtype=self.dtype)
        student = open_model(
            path,
            self.ranks,
            dtype=self.dtype,
            trains=lambda name: trains(name, stage=stage, mode=mode, unread=unread),
            kind=self.settings.parallel,
            fitting=Shared(self.teacher, required=frozen) if stage.shares(mode) else None,
        )
        student.model.gradient_checkpointing = (
            number != 1 and self.settings.stage(number).gradient_checkpointing
        )
        student.model.keep = self.settings.stage(number).keep
        return student.train()
