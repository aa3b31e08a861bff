"""What a run reports: ``Progress`` for an observer, rows of log.jsonl, TensorBoard scalars.

All three are made from the same rows, by the first process only. A row of log.jsonl is one step; on a resume
the rows after the checkpoint are dropped, so that the file reads as if nothing had happened. Metrics stay on
the device until several steps are read at once, so that the host does not wait for it in each step.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrwkv.distill.stages import StepResult

logger = logging.getLogger(__name__)

RATE_WINDOW = 50  # reports over which tokens per second are averaged


@dataclass(frozen=True)
class Validation:
    """Student against teacher on a fixed part of the dev split.

    kl: mean of KL(p_T || p_S), nats per token. agreement: share of tokens with the same likeliest token.
    Perplexities are of the next tokens inside documents. passkey: share of passkeys found, by the student and
    by its teacher; None where none were asked for.
    """

    kl: float
    agreement: float
    student_perplexity: float
    teacher_perplexity: float
    passkey: float | None = None
    teacher_passkey: float | None = None


@dataclass(frozen=True)
class Progress:
    """A run after one step.

    step: steps done of ``steps``; tokens: trained in this stage. loss: the stage's own; kl (nats per token)
    and agreement are of the training batch, None in stage 1. learning_rate: of the mixers. grad_norm: before
    clipping. layer_loss: of each layer in stage 1, empty otherwise. validation: only in a step that ended
    with one. skipped: the step was a spike and changed nothing; its grad_norm is then 0.
    """

    stage: int
    step: int
    steps: int
    tokens: int
    loss: float
    kl: float | None
    agreement: float | None
    tokens_per_second: float
    seconds_left: float
    learning_rate: float
    grad_norm: float
    layer_loss: tuple[float, ...] = ()
    validation: Validation | None = None
    skipped: bool = False


Observer = Callable[[Progress], None]


class Rate:
    """Tokens per second over the last reports."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=RATE_WINDOW)

    def update(self, tokens: int) -> float:
        """Tokens per second after ``tokens`` since the start."""
        self._points.append((time.perf_counter(), tokens))
        (began, before), (now, after) = self._points[0], self._points[-1]
        return (after - before) / max(now - began, 1e-9)


@dataclass(frozen=True)
class Metrics:
    """One step's numbers, still on the device as one tensor: loss, gradient norm, then the stage's own."""

    step: int
    learning_rate: float
    values: Tensor
    skipped: bool


def metrics_of(
    step: int, result: StepResult, norm: Tensor, *, learning_rate: float, skipped: bool
) -> Metrics:
    """Pack what a step left."""
    values = [result.loss, norm]
    if result.kl is not None and result.agreement is not None:
        values += [result.kl, result.agreement]
    if result.layer_loss is not None:
        values += result.layer_loss.unbind()
    return Metrics(step, learning_rate, torch.stack([value.float() for value in values]), skipped)


class Reporter:
    """Keeps the metrics of the last steps on the device, reads them at once, and reports them.

    done: steps before this run, of ``steps`` with ``batch_tokens`` each. log: None on all processes but the
    first.
    """

    def __init__(
        self,
        log: RunLog | None,
        observer: Observer,
        *,
        stage: int,
        steps: int,
        done: int,
        batch_tokens: int,
    ) -> None:
        self.log, self.observer = log, observer
        self.stage, self.steps, self.done, self.batch_tokens = stage, steps, done, batch_tokens
        self._rate = Rate()
        self._waiting: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """Keep a step's metrics, unread."""
        self._waiting.append(metrics)

    def read(self, validation: Validation | None, *, check: Callable[[int, list[float]], None]) -> None:
        """Report the kept steps; the validation belongs to the last of them.

        check: called on every process with step and numbers before the step is reported; may raise.
        """
        rows = torch.stack([metrics.values for metrics in self._waiting]).tolist()
        last = self._waiting[-1].step
        rate = self._rate.update((last - self.done) * self.batch_tokens)
        for metrics, row in zip(self._waiting, rows, strict=True):
            check(metrics.step, row)
            self._report(metrics, row, rate, validation if metrics.step == last else None)
        self._waiting.clear()

    def _report(self, metrics: Metrics, row: list[float], rate: float, validation: Validation | None) -> None:
        if self.log is None:
            return
        step, aligns = metrics.step, self.stage == 1
        progress = Progress(
            stage=self.stage,
            step=step,
            steps=self.steps,
            tokens=step * self.batch_tokens,
            loss=row[0],
            kl=None if aligns else row[2],
            agreement=None if aligns else row[3],
            tokens_per_second=rate,
            seconds_left=(self.steps - step) * self.batch_tokens / rate,
            learning_rate=metrics.learning_rate,
            grad_norm=row[1],
            layer_loss=tuple(row[2:]) if aligns else (),
            validation=validation,
            skipped=metrics.skipped,
        )
        self.log.write(progress)
        self.observer(progress)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()


class RunLog:
    """log.jsonl and TensorBoard of one stage, continued after step ``done``."""

    def __init__(self, out: Path, *, stage: int, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second to import, needed here only

        path = out / "log.jsonl"
        keep_rows(path, stage=stage, done=done)
        self._file = path.open("a", encoding="utf-8")
        folder = out / "tensorboard" / f"stage{stage}"
        self._board = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, progress: Progress) -> None:
        """Add one step."""
        row = asdict(progress)
        if progress.validation is None:
            del row["validation"]
        if not progress.layer_loss:
            del row["layer_loss"]
        if not progress.skipped:
            del row["skipped"]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        scalars = ("loss", "kl", "agreement", "learning_rate", "grad_norm", "tokens_per_second")
        values = {name: row[name] for name in scalars if row[name] is not None}
        values |= {f"layer_loss/{layer}": loss for layer, loss in enumerate(progress.layer_loss)}
        found = (row.get("validation") or {}).items()
        values |= {f"validation/{name}": value for name, value in found if value is not None}
        for name, value in values.items():
            self._board.add_scalar(name, value, progress.step)

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()
        self._board.close()


def keep_rows(path: Path, *, stage: int, done: int) -> None:
    """Drop the rows of ``stage`` after step ``done``, and a last line that was cut off in the middle."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _row(line)
        if row is not None and not (row["stage"] == stage and row["step"] > done):
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        logger.warning("dropping a line of log.jsonl that was cut off: %.60s", line)
        return None
    return row
