"""RoPE in the half-split form, as plain PyTorch: the definition."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The contract is ``hrwkv.kernels.rope.rotate``'s."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, K / 2]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
