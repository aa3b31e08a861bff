"""What a stage does with gradients and weights, on any number of processes and with any sharding.

``Engine`` is the whole interface between the trainer and the parallel libraries; ``fsdp.py`` and ``zero.py``
fill it in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hrwkv.distill.parallel.ranks import Ranks
from hrwkv.model.modeling import HybridModel

Kind = Literal["fsdp2", "zero1", "zero2", "zero3"]


class Engine(ABC):
    """One stage's student, its optimiser and their gradients, over all processes.

    Every process calls every method, in the same order. ``optimiser`` is there for its learning rates.
    """

    def __init__(self, student: HybridModel, optimiser: torch.optim.Optimizer, ranks: Ranks) -> None:
        self.student, self.optimiser, self.ranks = student, optimiser, ranks

    @abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the backward passes of one micro-batch; before the last one a reduction may be saved."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar: this process's part of a sum over processes."""

    @abstractmethod
    def step(self, max_norm: float) -> Tensor:
        """Clip to ``max_norm`` (0: not at all) and update; returns the norm [] from before clipping."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients in place of a step."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole fp32 master of each parameter that trains, one at a time; each is a collective."""

    @abstractmethod
    def save_moments(self, folder: Path) -> None:
        """Write the optimiser's state by parameter name into a folder that does not exist yet.

        Raises OSError on every process where one cannot write.
        """

    @abstractmethod
    def load_moments(self, folder: Path) -> None:
        """Fill the optimiser's state from what any engine wrote. Raises OSError for a damaged folder."""


class ReadState(Protocol):
    """``optimiser_state`` of ``distill/optimiser.py``: tensors by parameter name; ``fresh`` ones to fill."""

    def __call__(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, *, fresh: bool = False
    ) -> dict[str, Any]:
        """State of ``model``'s trained parameters."""
