"""What watches over a run: losses that jump, and numbers that are not finite.

``SpikeGuard`` compares each loss with the median of those before it. ``RestartError`` sends a stage back to
its last checkpoint, with what it must do otherwise this time. The search for the first block with a number
that is not finite runs a step's forward once more, so that steps without one pay nothing.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hrwkv.distill.optimiser import trained_parameters
from hrwkv.distill.parallel import local, release
from hrwkv.distill.stages import StepInput, StepOptions
from hrwkv.model.modeling import HybridModel

# Losses behind the median, and how many of them are needed before anything is called a spike.
WINDOW, ENOUGH = 64, 8


@dataclass(frozen=True)
class Attempt:
    """How a stage is run this time.

    number: restarts before it. left_out: steps whose gradients are dropped, because they were spikes.
    careful_until: up to this step each loss is read before the weights change.
    """

    number: int = 0
    left_out: frozenset[int] = frozenset()
    careful_until: int = 0


class RestartError(Exception):
    """The stage must go back to its last checkpoint and run as ``attempt`` says."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(f"restart {attempt.number}")
        self.attempt = attempt


class SpikeGuard:
    """Tells a loss that jumps from the median of the last accepted ones; ``losses`` go into checkpoints.

    factor: of the median, from where on it is a spike; 0 finds none.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(losses, maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss jumps; if not, it counts for the next median."""
        known = self.factor > 0 and len(self.losses) >= ENOUGH
        if known and loss > self.factor * statistics.median(self.losses):
            return True
        self.losses.append(loss)
        return False


@torch.no_grad()
def first_bad_block(
    teacher: HybridModel, student: HybridModel, parts: Sequence[StepInput], options: StepOptions
) -> str | None:
    """Where the first number that is not finite comes from: the output of which block, of which model.

    Runs both forwards on the inputs of the step. None if all outputs of all blocks are finite. On this
    process's part only; every process must call it.
    """
    found = None
    for part in parts:
        for name, model in (("teacher", teacher), ("student", student)):
            stream: list[torch.Tensor] = []
            with options.autocast():
                model(part.token_ids, part.batch, stream=stream)
            release(model)
            bad = [layer for layer, hidden in enumerate(stream) if not bool(hidden.isfinite().all())]
            if bad and found is None:
                found = f"layer {bad[0]} of the {name}"
    return found


def first_bad_gradient(student: HybridModel) -> str:
    """The first parameter, by the model's order, whose gradient is not finite."""
    for name, parameter in trained_parameters(student):
        if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
            return name
    return "its norm overflows"
