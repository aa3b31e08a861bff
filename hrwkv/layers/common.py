"""What both kinds of layer share: RMSNorm and SwiGLU (docs/hxa079.md, 1, 16)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrwkv.kernels.norm import add_rms_norm, rms_norm
from hrwkv.kernels.swiglu import swiglu
from hrwkv.layers.projections import Projections

Rope = tuple[Tensor, Tensor]  # cos and sin, each [T, K / 2] fp32


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in fp32 (hxa079.md 1)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x: [..., size] any float dtype -> its norm in x's shape and dtype.

        With delta, of x's shape: x + delta and the norm of that sum, in one pass.
        """
        if delta is None:
            return rms_norm(x, self.weight, eps=self.eps)
        return add_rms_norm(x, delta, weight=self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Size and eps, for ``print(model)``."""
        return f"{self.weight.numel()}, eps={self.eps}"


class SwiGLU(Projections):
    """``down(silu(gate(x)) * up(x))``, the teacher's MLP (hxa079.md 16)."""

    projections = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """x: [T, D] -> [T, D]; ``recompute`` keeps x alone for the backward pass."""
        if recompute:
            y: Tensor = checkpoint(self.forward, x, use_reentrant=False)
            return y
        product = self.projected(x)
        return self.down_proj(swiglu(product("gate_proj"), product("up_proj")))
