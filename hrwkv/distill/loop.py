"""One stage of a run: its steps, and the looks up from them.

A step is the sum over its micro-batches. Before the weights change, its loss is read where that costs nothing
(a CPU) or where it was asked for (spikes that are skipped, a second try after a number that is not finite);
otherwise the metrics of several steps are read at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hrwkv.data.prefetch import Prefetch
from hrwkv.distill.checkpointing import Checkpoint, Checkpoints
from hrwkv.distill.guard import Attempt, RestartError, SpikeGuard, first_bad_block, first_bad_gradient
from hrwkv.distill.logs import Observer, Reporter, RunLog, metrics_of
from hrwkv.distill.optimiser import schedule_factor, set_learning_rate
from hrwkv.distill.parallel import Engine, Ranks, total
from hrwkv.distill.stages import STAGES, StepInput, StepOptions, StepResult, split_rows
from hrwkv.distill.validation import Validator
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import DistillSettings

logger = logging.getLogger(__name__)

# Steps between two looks at the metrics; each look makes the host wait for the device.
STEPS_PER_READ = {"cpu": 1, "cuda": 10}


class RunStoppedError(Exception):
    """A run that was asked to stop has finished its step and written a checkpoint."""


@dataclass(frozen=True)
class StageParts:
    """What a stage works with; stop: asked after each step if it must end, source: where it began.

    stream: batch i is of step i + 1, with the rows of all processes.
    """

    number: int
    settings: DistillSettings
    teacher: HybridModel
    engine: Engine
    options: StepOptions
    stream: Prefetch
    validator: Validator
    checkpoints: Checkpoints
    source: Path
    out: Path
    observer: Observer
    stop: Callable[[], bool]


class StageLoop:
    """The steps of one stage, from its last checkpoint to the end of its budget.

    begun: that checkpoint, None for the stage's start. attempt: what a restart has changed.
    """

    def __init__(self, parts: StageParts, begun: Checkpoint | None, attempt: Attempt) -> None:
        self.parts, self.ranks = parts, parts.engine.ranks
        self.run_settings = parts.settings
        self.settings = parts.settings.stage(parts.number)
        self.steps, self.step_function = parts.settings.steps(parts.number), STAGES[parts.number].step
        self.attempt = attempt
        extra = {} if begun is None else begun.extra
        self.done = 0 if begun is None else begun.step
        self.left_out = attempt.left_out | frozenset(extra.get("left_out", ()))
        self.guard = SpikeGuard(parts.settings.spike_factor, extra.get("losses", ()))
        if begun is not None:
            parts.engine.load_moments(begun.moments)
            parts.stream.load_state_dict(extra["stream"])

    def train(self) -> None:
        """Run the steps.

        Raises ValueError for numbers that are not finite and for too many spikes, RestartError to be run
        again from the last checkpoint, RunStoppedError after a checkpoint that was asked for.
        """
        number, log = self.parts.number, None
        if self.ranks.is_first:
            log = RunLog(self.parts.out, stage=number, done=self.done)
        self.reporter = Reporter(
            log,
            self.parts.observer,
            stage=number,
            steps=self.steps,
            done=self.done,
            batch_tokens=self.run_settings.batch_tokens(number),
        )
        try:
            for step in range(self.done + 1, self.steps + 1):
                self._step(step)
                self._look_up(step)
        finally:
            self.parts.stream.close()
            self.reporter.close()

    def _look_up(self, step: int) -> None:
        """Report, validate, save and stop, where one of them is due."""
        last = step == self.steps
        validates = last or _is_due(step, self.run_settings.validate_every)
        saves = not last and _is_due(step, self.run_settings.checkpoint_every)
        reads = validates or saves or self._is_careful(step)
        reads = reads or step % STEPS_PER_READ[self.ranks.device.type] == 0
        if reads:
            found = self.parts.validator.measure(self.parts.engine.student) if validates else None
            self.reporter.read(found, check=self._check)
        stops = (reads or self.ranks.world == 1) and not last and anywhere(self.parts.stop(), self.ranks)
        if stops and not reads:
            self.reporter.read(None, check=self._check)
        if saves or stops:
            extra = {
                "losses": list(self.guard.losses),
                "left_out": sorted(self.left_out),
                "stream": self.parts.stream.state_dict(),
            }
            self.parts.checkpoints.save(
                self.parts.number, step, self.parts.engine, source=self.parts.source, extra=extra
            )
        if stops:
            raise RunStoppedError(f"stopped after step {step}/{self.steps} of stage {self.parts.number}")

    def _step(self, step: int) -> None:
        """One optimiser step; the first is 1."""
        factor = schedule_factor(
            step - 1,
            steps=self.steps,
            warmup_ratio=self.settings.warmup_ratio,
            final_ratio=self.settings.final_lr_ratio,
        )
        engine = self.parts.engine
        set_learning_rate(engine.optimiser, factor)
        inputs = micro_batches(
            *self.parts.stream.batch(step - 1),
            context_length=self.run_settings.context_length(self.parts.number),
            tokens=self.settings.micro_batch_tokens,
            ranks=self.ranks,
        )
        results = []
        for number, part in enumerate(inputs):
            with engine.micro_batch(last=number == len(inputs) - 1):
                results.append(
                    self.step_function(self.parts.teacher, engine.student, part, self.parts.options)
                )
        result = added(results)
        skipped = step in self.left_out or (self._looks_first(step) and self._is_bad(step, inputs, result))
        if skipped:
            engine.discard()
            norm = torch.zeros_like(result.loss)
        else:
            norm = engine.step(self.settings.clip)
        rate = factor * self.settings.learning_rate
        self.reporter.add(metrics_of(step, result, norm, learning_rate=rate, skipped=skipped))

    def _is_careful(self, step: int) -> bool:
        """Whether the step is read before the next one begins."""
        return self.ranks.device.type == "cpu" or step <= self.attempt.careful_until

    def _looks_first(self, step: int) -> bool:
        """Whether the loss is read before the weights change."""
        skips = self.run_settings.spike_factor > 0 and self.run_settings.spike_action == "skip"
        return skips or self._is_careful(step)

    def _is_bad(self, step: int, inputs: list[StepInput], result: StepResult) -> bool:
        """Whether the step is to be skipped. Raises what ends the run or sends it back."""
        loss = float(result.loss)
        if not math.isfinite(loss):
            student = self.parts.engine.student
            where = first_bad_block(self.parts.teacher, student, inputs, self.parts.options)
            raise ValueError(self._not_finite(step, _loss_name(result), where))
        return self._is_spike(step, loss)

    def _is_spike(self, step: int, loss: float) -> bool:
        """Whether the step is to be skipped as a spike. Raises RestartError to go back before it."""
        if not self.guard.is_spike(loss):
            return False
        settings = self.run_settings
        self.left_out |= {step}
        if len(self.left_out) > settings.spike_limit:
            raise ValueError(
                f"stage {self.parts.number}, step {step}: the loss {loss:.4g} is spike number "
                f"{len(self.left_out)}, spike_limit is {settings.spike_limit}; lower the learning rate"
            )
        logger.warning(
            "stage %d, step %d: the loss %.4g is more than %g times the running median; %s",
            self.parts.number,
            step,
            loss,
            settings.spike_factor,
            "its gradients are left out"
            if settings.spike_action == "skip"
            else "back to the last checkpoint",
        )
        if settings.spike_action == "rollback":
            raise RestartError(replace(self.attempt, left_out=self.left_out))
        return True

    def _check(self, step: int, row: list[float]) -> None:
        """Look at the numbers of a step that has changed the weights: loss, gradient norm, and the others.

        Of a careful step the loss is known to be finite, so that only the gradient can be to blame.
        """
        if not all(map(math.isfinite, row)):
            if not self._is_careful(step):
                self._look_closer(step)
            what = f"the gradient ({first_bad_gradient(self.parts.engine.student)})"
            raise ValueError(self._not_finite(step, what, None))
        if step not in self.left_out and not self._looks_first(step):
            self._is_spike(step, row[0])

    def _look_closer(self, step: int) -> None:
        """Go back to where the weights were good, and come here step by step."""
        number = self.attempt.number + 1
        if number > self.run_settings.spike_limit:
            raise ValueError(self._not_finite(step, "a number", None))
        logger.warning(
            "stage %d, step %d: a number is not finite; back to the last checkpoint to find its origin",
            self.parts.number,
            step,
        )
        raise RestartError(replace(self.attempt, number=number, careful_until=step))

    def _not_finite(self, step: int, what: str, where: str | None) -> str:
        first = f", first in the output of {where}" if where else ""
        return (
            f"stage {self.parts.number}, step {step}: {what} is not finite{first}; lower the learning rate, "
            "or resume from the last checkpoint if this was a fault of the machine"
        )


def micro_batches(
    token_ids: Tensor, batch: TokenBatch, *, context_length: int, tokens: int | None, ranks: Ranks
) -> list[StepInput]:
    """This process's micro-batches of a global batch, on its device.

    tokens: of one of them; None, or more than the share of a process, makes one. Raises ValueError where the
    rows cannot be divided among processes or a share not into micro-batches.
    """
    share = len(token_ids) // ranks.world
    count = 1
    if tokens is not None and tokens < share:
        count = share // tokens
        if share % tokens:
            raise ValueError(
                f"a process takes {share} tokens of a step, in micro-batches of {tokens}: make "
                f"batch_tokens a multiple of {tokens * ranks.world}"
            )
    first, world = ranks.rank * count, ranks.world * count
    return [
        split_rows(
            token_ids,
            batch,
            context_length=context_length,
            ranks=replace(ranks, rank=first + number, world=world),
        )
        for number in range(count)
    ]


def added(results: list[StepResult]) -> StepResult:
    """A step's result from those of its micro-batches, each of which is a part of it."""
    if len(results) == 1:
        return results[0]
    loss = torch.stack([result.loss for result in results]).sum(0)

    def summed(name: str) -> Tensor | None:
        values = [value for result in results if (value := getattr(result, name)) is not None]
        return torch.stack(values).sum(0) if values else None

    return StepResult(
        loss=loss, layer_loss=summed("layer_loss"), kl=summed("kl"), agreement=summed("agreement")
    )


def _loss_name(result: StepResult) -> str:
    """The loss, and in stage 1 of which layers."""
    if result.layer_loss is None:
        return "the loss"
    bad = [str(layer) for layer, loss in enumerate(result.layer_loss.tolist()) if not math.isfinite(loss)]
    return f"the loss of layer {', '.join(bad)}"


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def anywhere(flag: bool, ranks: Ranks) -> bool:
    """Whether any process says yes; every process must ask."""
    if ranks.world == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=ranks.device), ranks))
