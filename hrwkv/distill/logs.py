"""What a run reports: ``Progress`` for an observer, rows of log.jsonl, TensorBoard scalars.

All three are made from the same rows, by the first process only. A row of log.jsonl is one step; on a resume
the rows after the checkpoint are dropped, so that the file reads as if nothing had happened.
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

logger = logging.getLogger(__name__)

RATE_WINDOW = 50  # reports over which tokens per second are averaged


@dataclass(frozen=True)
class Validation:
    """Student against teacher on a fixed part of the dev split.

    kl: mean of KL(p_T || p_S), nats per token. agreement: share of tokens with the same likeliest token.
    Perplexities are of the next tokens inside documents.
    """

    kl: float
    agreement: float
    student_perplexity: float
    teacher_perplexity: float


@dataclass(frozen=True)
class Progress:
    """A run after one step.

    step: steps done of ``steps``; tokens: trained in this stage. loss: the stage's own; kl (nats per token)
    and agreement are of the training batch, None in stage 1. learning_rate: of the mixers. grad_norm: before
    clipping. layer_loss: of each layer in stage 1, empty otherwise. validation: only in a step that ended
    with one.
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


class RunLog:
    """log.jsonl and TensorBoard of one stage, continued after step ``done``."""

    def __init__(self, out: Path, *, stage: int, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second to import, needed here only

        path = out / "log.jsonl"
        keep_rows(path, stage=stage, done=done)
        self._file = path.open("a", encoding="utf-8")
        folder = out / "tensorboard" / f"stage{stage}"
        self._board = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, progress: Progress) -> None:
        """Add one step."""
        row = asdict(progress)
        if progress.validation is None:
            del row["validation"]
        if not progress.layer_loss:
            del row["layer_loss"]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        scalars = ("loss", "kl", "agreement", "learning_rate", "grad_norm", "tokens_per_second")
        values = {name: row[name] for name in scalars if row[name] is not None}
        values |= {f"layer_loss/{layer}": loss for layer, loss in enumerate(progress.layer_loss)}
        values |= {f"validation/{name}": value for name, value in (row.get("validation") or {}).items()}
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
