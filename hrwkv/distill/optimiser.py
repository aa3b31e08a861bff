"""AdamW over the parameters that train, its groups, and the learning rate as a function of the step.

Mixers and everything else have their own peak rates, vectors are never decayed, and one factor moves all
rates: a linear rise, then a cosine that ends with the stage's last token. The weights and both moments are
fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hrwkv.distill.parallel import whole_shape
from hrwkv.distill.stages import MIXER
from hrwkv.settings import StageSettings

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything with ``requires_grad``, tied ones once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """True for matrices; r_k [H, K] is a vector per head."""
    return len(whole_shape(parameter)) > 1 and not name.endswith(".r_k")


def build_optimiser(model: nn.Module, settings: StageSettings) -> torch.optim.AdamW:
    """AdamW with one group per peak rate and decay; a group's ``peak`` is its rate before the schedule."""
    base = settings.learning_rate if settings.base_learning_rate is None else settings.base_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model):
        peak = settings.learning_rate if MIXER.fullmatch(name) else base
        decay = settings.weight_decay if is_decayed(name, parameter) else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    rows = [
        {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
        for (peak, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(rows, betas=settings.betas, fused=True)


def schedule_factor(step: int, *, steps: int, warmup_ratio: float, final_ratio: float) -> float:
    """Rate over peak rate at ``step`` of ``steps``: rises to 1, then falls by a cosine to ``final_ratio``.

    The first step already has 1/warmup of the peak, the last one exactly ``final_ratio``.
    """
    warmup = min(round(steps * warmup_ratio), steps - 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def optimiser_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, *, fresh: bool = False
) -> dict[str, Any]:
    """AdamW's moments by parameter name; ``fresh`` gives zeros of the right shapes to be filled."""
    state = {}
    for name, parameter in trained_parameters(model):
        if fresh:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            values = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            optimiser.state[parameter] = values
        state[name] = {moment: optimiser.state[parameter][moment] for moment in MOMENTS}
    return state
