"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import require


@dataclass(frozen=True)
class PlanSettings:
    """What a plan is made for.

    Raises ValueError, naming the field, for a value that no plan can have.
    """

    gpu: Literal["h100", "h200", "mi300x", "a100", "rtx4090", "cpu"] | None = None
    """Kind of GPU; None takes the one that is found here."""
    gpus: int = 1
    """How many of them."""
    price: float | None = None
    """Price of one of them for an hour, in whatever currency."""

    def __post_init__(self) -> None:
        """Check what can be told without a recipe."""
        require(self.gpus >= 1, "gpus", self.gpus, "at least 1")
        require(self.price is None or self.price >= 0, "price", self.price, "0 or more an hour, or left out")
