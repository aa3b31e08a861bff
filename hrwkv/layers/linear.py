"""Linear maps and MLPs whose weights are frozen in 8 bits; what is computed how: ``kernels/matmul``.

They take the place of ``nn.Linear`` and ``SwiGLU`` in a model whose weights have not been read yet. The 8-bit
form is no parameter and in no state dict: it is made from a checkpoint's weights and never written into one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hrwkv.kernels.matmul import FrozenWeight, frozen_linear, frozen_swiglu, quantise
from hrwkv.kernels.swiglu import swiglu


class FrozenLinear(nn.Module):
    """``x W^T (+ b)`` with W in 8 bits and a scale a row; a bias stays a parameter in its own dtype."""

    values: Tensor
    scales: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer(
            "values", torch.empty(out_features, in_features, dtype=dtype, device="meta"), persistent=False
        )
        self.register_buffer("scales", torch.empty(out_features, device="meta"), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @property
    def weight(self) -> FrozenWeight:
        """The weight as the kernels take it."""
        return FrozenWeight(self.values, self.scales)

    def fill(self, weight: Tensor) -> None:
        """Take a weight [out_features, in_features] in any float dtype, and its device."""
        assert weight.shape == self.values.shape
        self.values, self.scales = quantise(weight, self.values.dtype)

    def holds(self, weight: Tensor) -> bool:
        """True if ``fill`` with this weight would change nothing."""
        values, scales = quantise(weight.to(self.values.device), self.values.dtype)
        same = torch.equal(values.view(torch.uint8), self.values.view(torch.uint8))
        return same and torch.equal(scales, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features] in x's dtype, or autocast's."""
        x = _autocast(x)
        y = frozen_linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and dtype, for ``print(model)``."""
        return f"{self.values.shape[1]}, {self.values.shape[0]}, {self.values.dtype}"


class FrozenSwiGLU(nn.Module):
    """The teacher's MLP (hxa079.md 16) of three ``FrozenLinear``, as one function unless they have biases."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = FrozenLinear(hidden_size, intermediate_size, dtype=dtype, bias=bias)
        self.up_proj = FrozenLinear(hidden_size, intermediate_size, dtype=dtype, bias=bias)
        self.down_proj = FrozenLinear(intermediate_size, hidden_size, dtype=dtype, bias=bias)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """x: [T, D] -> [T, D]; ``recompute`` keeps x in place of the inner activations (not with biases)."""
        if self.gate_proj.bias is not None:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return frozen_swiglu(_autocast(x), gate, up, down, recompute=recompute)


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
