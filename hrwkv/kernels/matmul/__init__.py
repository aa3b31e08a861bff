"""Products with frozen weights of 8 bits: linear maps and the SwiGLU, with the gradient of their input.

Weights are rows of float8_e4m3fn or int8 with an fp32 scale each. Where a chip multiplies 8-bit floats
(Hopper and later, sizes that divide by 16) a float8 weight meets its input in 8 bits, rounded row by row:
rows of x in the forward pass, rows of the gradient in the backward pass, where the weight's own scales, then
along the summed axis, go into the gradient before it is rounded. Everywhere else the weight is widened to the
input's dtype for the time of one product, which is exact but for that dtype's rounding; int8 is always
computed so. The gradient stays in e4m3: with a scale a row its range is not needed, and e5m2 would cost one
of three bits of precision. On the small teacher of examples/ the whole gradient of a distillation step moves
by 1.0 % through it (e5m2: 2.3 %), by 4.7 % through float8 weights and 1.2 % through int8 ones. Left out:
gradients of the weights, which are frozen.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hrwkv.kernels.matmul import naive
from hrwkv.kernels.swiglu import swiglu, swiglu_gradients

__all__ = ["FrozenWeight", "dequantise", "frozen_linear", "frozen_swiglu", "quantise", "rounds_inputs"]


class FrozenWeight(NamedTuple):
    """values: [N, K] float8_e4m3fn or int8. scales: [N] fp32, so that row n is ``values[n] * scales[n]``."""

    values: Tensor
    scales: Tensor


def quantise(weight: Tensor, dtype: torch.dtype) -> FrozenWeight:
    """weight [N, K] any float dtype -> 8 bits with a scale a row. Raises ValueError for another dtype."""
    if dtype not in naive.LARGEST:
        raise ValueError(f"dtype is {dtype}, expected torch.float8_e4m3fn or torch.int8")
    return FrozenWeight(*naive.quantise_rows(weight, dtype=dtype))


def dequantise(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype``, rounded once."""
    wide = torch.empty(weight.values.shape, dtype=dtype, device=weight.values.device)
    # Values are exact in bf16; their product with the fp32 scale is rounded into ``wide``, not kept in fp32.
    return torch.mul(weight.values.to(dtype), weight.scales.unsqueeze(-1), out=wide)


def rounds_inputs(weight: FrozenWeight) -> bool:
    """True where products with this weight are computed in 8 bits, its inputs rounded for that."""
    return (
        weight.values.is_cuda
        and torch.version.hip is None  # MI300 multiplies another e4m3, without a negative zero
        and weight.values.dtype == torch.float8_e4m3fn
        and torch.cuda.get_device_capability(weight.values.device) >= (9, 0)
        and all(size % 16 == 0 for size in weight.values.shape)
    )


def frozen_linear(x: Tensor, weight: FrozenWeight, *, in_8_bits: bool | None = None) -> Tensor:
    """``x weight^T``: x [T, K] -> [T, N] in x's dtype, with the gradient of x.

    in_8_bits: whether inputs are rounded; None asks ``rounds_inputs``. True on a CPU computes what a GPU
    would, slowly.
    """
    in_8_bits = rounds_inputs(weight) if in_8_bits is None else in_8_bits
    result: Tensor = _FrozenLinear.apply(x, weight, in_8_bits)
    return result


def frozen_swiglu(
    x: Tensor,
    gate: FrozenWeight,
    up: FrozenWeight,
    down: FrozenWeight,
    *,
    recompute: bool = False,
    in_8_bits: bool | None = None,
) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, hxa079.md (16): x [T, D] -> [T, D], with the gradient of x.

    recompute: keep x for the backward pass (in 8 bits where it is rounded to them) and compute gate and up
    again there, in place of keeping both; ``down`` is never computed twice. in_8_bits: as in
    ``frozen_linear``.
    """
    in_8_bits = rounds_inputs(gate) and rounds_inputs(down) if in_8_bits is None else in_8_bits
    result: Tensor = _FrozenSwiGLU.apply(x, gate, up, down, recompute, in_8_bits)
    return result


class _Rows(NamedTuple):
    """A product's left side: as it is, or 8-bit rows with their scales."""

    values: Tensor
    scales: Tensor | None = None

    def times(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """``rows weight^T``, [T, N]."""
        if self.scales is None:
            return self.values @ dequantise(weight, dtype).T
        return _scaled_product(self.values, self.scales, weight, dtype)


def _rows(x: Tensor, in_8_bits: bool) -> _Rows:
    return _Rows(*_form(x).quantise_rows(x)) if in_8_bits else _Rows(x)


def _form(x: Tensor) -> ModuleType:
    """The elementwise work for x's device."""
    if x.is_cuda:
        from hrwkv.kernels.matmul import fused

        return fused
    return naive


def _scaled_product(x: Tensor, scale: Tensor, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """``naive.scaled_product``, on a GPU by torch's kernel with a scale a row, which gives bf16."""
    if not x.is_cuda:
        return naive.scaled_product(x, scale, *weight).to(dtype)
    product = torch._scaled_mm(
        x,
        weight.values.T,
        scale_a=scale.unsqueeze(-1),
        scale_b=weight.scales.unsqueeze(0),
        out_dtype=torch.bfloat16,
        # Sums in the tensor core's own precision, some 14 bits: far above e4m3's four.
        use_fast_accum=True,
    )
    return product.to(dtype)


def _transposed(weight: FrozenWeight) -> FrozenWeight:
    """The weight with its axes exchanged and no scales: they lie along the summed axis then."""
    values = weight.values
    if values.is_cuda:
        from hrwkv.kernels.matmul import fused

        turned = fused.transpose(values)
    else:
        turned = values.T
    return FrozenWeight(turned, weight.scales.new_ones(len(turned)))


def _back(grad: Tensor, weight: FrozenWeight, in_8_bits: bool) -> Tensor:
    """``grad weight``: [T, N] -> [T, K] in grad's dtype."""
    if not in_8_bits:
        return grad @ dequantise(weight, grad.dtype)
    values, scale = _form(grad).quantise_rows(grad, columns=weight.scales)
    return _scaled_product(values, scale, _transposed(weight), grad.dtype)


class _FrozenLinear(torch.autograd.Function):
    """Saves nothing: the gradient needs the weight alone, and it does not change."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: FrozenWeight, in_8_bits: bool) -> Tensor:
        ctx.weight, ctx.in_8_bits = weight, in_8_bits  # type: ignore[attr-defined]
        return _rows(x, in_8_bits).times(weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _back(grad, ctx.weight, ctx.in_8_bits), None, None  # type: ignore[attr-defined]


class _FrozenSwiGLU(torch.autograd.Function):
    """One function, so that the product of gate and up exists in 8 bits only."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        gate: FrozenWeight,
        up: FrozenWeight,
        down: FrozenWeight,
        recompute: bool,
        in_8_bits: bool,
    ) -> Tensor:
        ctx.weights, ctx.form = (gate, up, down), (recompute, in_8_bits, x.dtype)  # type: ignore[attr-defined]
        rows = _rows(x, in_8_bits)
        g, u = rows.times(gate, x.dtype), rows.times(up, x.dtype)  # [T, I]
        ctx.save_for_backward(*(rows if recompute else (g, u)))
        inner = _Rows(*_form(g).swiglu_rows(g, u)) if in_8_bits else _Rows(swiglu(g, u))
        return inner.times(down, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.weights  # type: ignore[attr-defined]
        recompute, in_8_bits, dtype = ctx.form  # type: ignore[attr-defined]
        g, u = ctx.saved_tensors  # type: ignore[attr-defined]
        if recompute:
            rows = _Rows(g, u)
            g, u = rows.times(gate, dtype), rows.times(up, dtype)
        inner = _back(grad, down, in_8_bits)  # [T, I]
        if in_8_bits:
            rows_of = _form(g).swiglu_gradient_rows
            for_gate, gate_scale, for_up, up_scale = rows_of(
                inner, g, u, gate_columns=gate.scales, up_columns=up.scales
            )
            grad_x = _scaled_product(for_gate, gate_scale, _transposed(gate), dtype)
            grad_x += _scaled_product(for_up, up_scale, _transposed(up), dtype)
        else:
            for_g, for_u = swiglu_gradients(inner, g, u)
            grad_x = for_g @ dequantise(gate, dtype) + for_u @ dequantise(up, dtype)
        return grad_x, None, None, None, None, None
