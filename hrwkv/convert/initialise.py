"""What a conversion cannot copy: sizes and initial values of the RWKV-7 parameters (docs/hxa079.md 26 to 29).

Two recipes: ``hxa079``, that of the released models, and ``radlads``, that of the paper (arXiv 2505.03005).
Every random matrix has its own generator, named by seed, layer and tensor, so a layer starts the same
whatever other layers are kept. Values are computed in fp32 and stored as the teacher's weights are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrwkv.model.config import RANKS, HybridConfig
from hrwkv.settings import ConvertSettings

FACTOR_NAMES = ("receptance", "key", "value", "output")


@dataclass(frozen=True)
class Recipe:
    """The numbers in which one initialisation differs from another.

    factors: on the teacher's q, k, v, o (29). residual: value of v0 and k0. bonus: value of r_k.
    """

    factors: tuple[float, float, float, float]
    residual: float
    bonus: float


# The paper has no key residual; with its initialisation ours starts as the value residual does.
RECIPES = {
    "hxa079": Recipe(factors=(0.5, 0.5, 0.3, 0.5), residual=0.73, bonus=-0.04),
    "radlads": Recipe(factors=(1.0, 1.0, 1.0, 1.0), residual=1.0, bonus=0.0),
}


def copy_factors(settings: ConvertSettings) -> dict[str, float]:
    """What the teacher's weights are multiplied with, for receptance, key, value and output (29)."""
    given = [getattr(settings, f"{name}_factor") for name in FACTOR_NAMES]
    own = RECIPES[settings.initialisation].factors
    return {
        name: default if value is None else value
        for name, value, default in zip(FACTOR_NAMES, given, own, strict=True)
    }


def rank_sizes(config: HybridConfig, settings: ConvertSettings) -> dict[str, int]:
    """The low-rank sizes by config field: those given, else the formula's (28).

    The released models' formula is in C = H * K and has minima that are too large for tiny models; the
    paper's is in the hidden size.
    """
    if settings.initialisation == "radlads":
        size = config.hidden_size
        rules = [(0.5, 1.8, 1), (0.5, 1.8, 1), (0.5, 1.3, 1), (0.5, 1.3, 1), (0.8, 0.6, 1)]
    else:
        size = config.num_attention_heads * config.head_dim
        rules = [(0.6, 1.7, 8), (0.5, 1.8, 1), (0.5, 1.3, 1), (0.5, 1.3, 1), (0.8, 0.35, 8)]
    return {
        name: getattr(settings, name) or 32 * max(least, round(factor * size**exponent / 32))
        for name, (exponent, factor, least) in zip(RANKS, rules, strict=True)
    }


def initial_value(
    name: str, shape: tuple[int, ...], *, layer: int, config: HybridConfig, settings: ConvertSettings
) -> Tensor:
    """The start of one mixer parameter, fp32 on the CPU.

    name: as in ``TimeMix``: w0, w1, w2, .. g2, r_k. shape: the parameter's. layer: its layer's index.
    Source: docs/hxa079.md (26), (27).
    """
    recipe = RECIPES[settings.initialisation]
    if name == "w0":
        return _decay_base(layer, config, settings.initialisation)
    if name == "a0":
        return _rate_base(config) if settings.initialisation == "hxa079" else torch.zeros(shape)
    if name in ("v0", "k0"):
        given = settings.residual_logit
        return torch.full(shape, recipe.residual if given is None else given)
    if name == "r_k":
        return torch.full(shape, recipe.bonus)
    if name in ("w1", "a1", "v1", "k1", "g1"):
        return torch.zeros(shape)
    assert name in ("w2", "a2", "v2", "k2", "g2"), name
    return _orthogonal(shape, 0.1, generator=tensor_generator(settings.seed, layer=layer, name=name))


def tensor_generator(seed: int, *, layer: int, name: str) -> torch.Generator:
    """A generator of this tensor alone, so that no other tensor's presence can change it."""
    digest = hashlib.sha256(f"{seed}/{layer}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _decay_base(layer: int, config: HybridConfig, initialisation: str) -> Tensor:
    """w0 [C] of (26): slow to fast decay over the channels, more of them slow in deeper layers."""
    channels = _channels(config)
    depth = _ratio(layer, config.num_hidden_layers - 1)
    if initialisation == "radlads":
        return -7 + 5 * channels ** (0.85 + depth**0.5) + 0.5
    return -6 + 6 * channels ** (1 + depth**0.3) + 0.5 + 2.5 * _zigzag(config)


def _rate_base(config: HybridConfig) -> Tensor:
    """a0 [C] of (26)."""
    return -0.19 + 0.3 * _zigzag(config) + 0.4 * (_channels(config) - 0.5)


def _channels(config: HybridConfig) -> Tensor:
    """n / (C - 1) for n = 0 .. C - 1."""
    width = config.num_attention_heads * config.head_dim
    return torch.arange(width, dtype=torch.float32) / max(width - 1, 1)


def _zigzag(config: HybridConfig) -> Tensor:
    """z |z| of (26), where z runs from -1 to 1 inside each head; [C]."""
    z = torch.linspace(-1, 1, config.head_dim)
    return (z * z.abs()).repeat(config.num_attention_heads)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _orthogonal(shape: tuple[int, ...], scale: float, *, generator: torch.Generator) -> Tensor:
    """``ortho(scale)`` of (27), [rows, columns]: orthonormal rows or columns, times the scale."""
    rows, columns = shape
    gain = scale * max(rows / columns, 1.0) ** 0.5
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)
