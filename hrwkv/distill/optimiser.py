"""AdamW over the parameters that train, its groups, and the learning rate as a function of the step.

Mixers and everything else have their own peak rates, vectors are never decayed, and one factor moves all
rates: a linear rise, then a cosine that ends with the stage's last token. The weights are fp32, and so are
both moments, unless they are asked for in 8 bits (torchao, arXiv 2110.02861, blocks of 256).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hrwkv.distill.parallel import local, whole_shape
from hrwkv.distill.stages import MIXER
from hrwkv.settings import StageSettings

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything with ``requires_grad``, tied ones once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """True for matrices; r_k [H, K] is a vector per head."""
    return len(whole_shape(parameter)) > 1 and not name.endswith(".r_k")


def build_optimiser(model: nn.Module, settings: StageSettings) -> torch.optim.Optimizer:
    """AdamW with one group per peak rate and decay; a group's ``peak`` is its rate before the schedule.

    Raises ValueError for ``adamw8bit`` without torchao.
    """
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
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(rows, betas=settings.betas, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimiser is 'adamw8bit' but torchao is missing: pip install torchao") from error
    optimiser: torch.optim.Optimizer = AdamW8bit(rows, betas=settings.betas)
    return optimiser


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
        rate = group["peak"] * factor
        if isinstance(group["lr"], Tensor):  # torchao's, compiled with it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimiser_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, *, fresh: bool = False
) -> dict[str, Any]:
    """AdamW's state by parameter name; ``fresh`` makes a state of the right shapes first, to be filled.

    A moment in 8 bits is given as the tensors that it consists of.
    """
    if fresh:
        _make_state(model, optimiser)
    state: dict[str, Any] = {}
    for name, parameter in trained_parameters(model):
        state[name] = {}
        for moment in MOMENTS:
            state[name] |= _plain(moment, optimiser.state[parameter][moment])
    return state


def _make_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Let the optimiser make its own state: a step that moves nothing."""
    set_learning_rate(optimiser, 0.0)
    for _, parameter in trained_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _plain(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor as itself, one of torchao's by its parts; a shard of either is known to checkpoints."""
    if type(value) is Tensor or local(value) is not value:
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in ("codes", "scale")}
