"""``silu(gate) * up`` and its gradients in one launch each (Triton); backward computes silu again.

A program takes a part of a row. ``silu`` and ``gate_gradients`` are what a program does with its elements,
also in ``kernels/matmul``, where the results go into 8 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # 16 bytes of bf16 a thread and tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The contract is ``hrwkv.kernels.swiglu.swiglu``'s."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The contract is ``hrwkv.kernels.swiglu.swiglu_gradients``'s."""
    inputs = [_rows(x) for x in (grad, gate, up)]
    for_gate, for_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _swiglu_backward[_grid(gate)](
        *inputs, *(x.stride(0) for x in inputs), for_gate, for_up, gate.shape[1], BLOCK=BLOCK
    )
    return for_gate, for_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        gate, up = _rows(gate), _rows(up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _swiglu_forward[_grid(gate)](gate, up, gate.stride(0), up.stride(0), y, gate.shape[1], BLOCK=BLOCK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return swiglu_gradients(grad, *ctx.saved_tensors)


def _rows(x: Tensor) -> Tensor:
    """x with each row contiguous; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int]:
    return (len(x) * triton.cdiv(x.shape[1], BLOCK),)


@triton.jit
def silu(x):
    """Of an fp32 tile."""
    return x / (1 + tl.exp(-x))


@triton.jit
def gate_gradients(grad, gate, up):
    """Gradients of ``silu(gate) * up`` on gate and up, all fp32 tiles."""
    sigmoid = 1 / (1 + tl.exp(-gate))
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """The program's row, and its columns [BLOCK]."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    return row, (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _swiglu_forward(
    gate,  # [T, I]
    up,  # [T, I]
    gate_stride,
    up_stride,
    y,  # [T, I], contiguous
    width,
    BLOCK: tl.constexpr,
):
    row, column = _place(width, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (silu(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    grad,  # [T, I], of y
    gate,  # [T, I]
    up,  # [T, I]
    grad_stride,
    gate_stride,
    up_stride,
    for_gate,  # [T, I], contiguous
    for_up,  # [T, I], contiguous
    width,
    BLOCK: tl.constexpr,
):
    row, column = _place(width, BLOCK)
    inside = column < width
    slope = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    slope_gate, slope_up = gate_gradients(slope, g, u)
    tl.store(for_gate + row * width + column, slope_gate.to(for_gate.dtype.element_ty), mask=inside)
    tl.store(for_up + row * width + column, slope_up.to(for_up.dtype.element_ty), mask=inside)
