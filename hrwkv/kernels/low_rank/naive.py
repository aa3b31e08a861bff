"""The definition of ``expand``."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["none", "tanh", "sigmoid"]


def expand(
    inner: Sequence[Tensor], up: Sequence[Tensor], *, activations: Sequence[Activation]
) -> list[Tensor]:
    """The contract is ``hrwkv.kernels.low_rank.expand``'s."""
    return [activate(x, name) @ w for x, w, name in zip(inner, up, activations, strict=True)]


def activate(x: Tensor, name: Activation) -> Tensor:
    """x: any shape and float dtype, which the result has."""
    match name:
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "none":
            return x
