"""RMSNorm as the definition says, hxa079.md (1)."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """The contract is ``hrwkv.kernels.norm.rms_norm``'s."""
    normed = F.rms_norm(x.float(), weight.shape, None, eps)
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, *, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The contract is ``hrwkv.kernels.norm.add_rms_norm``'s."""
    total = x + delta
    return total, rms_norm(total, weight, eps=eps)
