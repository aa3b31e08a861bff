"""Products of 8-bit rows, and the elementwise work around them, as plain PyTorch: the definition.

A row is stored as ``values * scale`` with the scale in fp32, so that its largest element is the largest that
the dtype has. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.kernels.swiglu.naive import swiglu_gradients

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantise_rows(
    x: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, K], times ``columns`` [K], as 8-bit values [T, K] and scales [T]; a row of zeros has scale 1."""
    x = x.float() if columns is None else x.float() * columns
    largest = x.abs().amax(-1)
    scale = torch.where(largest > 0, largest / LARGEST[dtype], 1.0)
    scaled = x / scale.unsqueeze(-1)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def scaled_product(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``(x * scale) (weight * weight_scale)^T``: x [T, K], weight [N, K], a scale a row -> [T, N] fp32."""
    return (x.float() @ weight.float().T) * scale.unsqueeze(-1) * weight_scale


def swiglu_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` [T, I] as 8-bit rows and their scales."""
    return quantise_rows(F.silu(gate.float()) * up.float())


def swiglu_gradient_rows(
    grad: Tensor, gate: Tensor, up: Tensor, *, gate_columns: Tensor, up_columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``swiglu_gradients`` times ``gate_columns`` and ``up_columns`` [I]: rows, scales of each in turn."""
    for_gate, for_up = swiglu_gradients(grad, gate, up)
    return *quantise_rows(for_gate, columns=gate_columns), *quantise_rows(for_up, columns=up_columns)
