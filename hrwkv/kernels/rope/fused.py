"""RoPE in one launch (Triton); the gradient is the rotation back, by the same kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of half a tile: some heads of one token.
HALF_TILE = 2048


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The contract is ``hrwkv.kernels.rope.rotate``'s."""
    y: Tensor = _Rotate.apply(x, cos, sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _launch(grad, cos, -sin), None, None


def _launch(x, cos, sin):
    x = x.contiguous()
    num_tokens, num_heads, width = x.shape
    y = torch.empty_like(x)
    block = triton.next_power_of_2(width // 2)
    heads = max(1, min(triton.next_power_of_2(num_heads), HALF_TILE // block))
    grid = (num_tokens * triton.cdiv(num_heads, heads),)
    _rotate[grid](x, cos.contiguous(), sin.contiguous(), y, num_heads, width // 2, HEADS=heads, BLOCK=block)
    return y


@triton.jit
def _rotate(
    x,  # [T, H, K]
    cos,  # [T, K / 2] fp32
    sin,  # [T, K / 2] fp32
    y,  # [T, H, K]
    num_heads,
    half,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups = tl.cdiv(num_heads, HEADS)
    token = (tl.program_id(0) // groups).to(tl.int64)
    head = (tl.program_id(0) % groups) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    table = token * half + column
    c = tl.load(cos + table, mask=column < half, other=0.0)[None, :]
    s = tl.load(sin + table, mask=column < half, other=0.0)[None, :]
    place = (token * num_heads + head)[:, None] * (2 * half) + column[None, :]
    inside = (head < num_heads)[:, None] & (column < half)[None, :]
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (first * c - second * s).to(y.dtype.element_ty), mask=inside)
    tl.store(y + place + half, (second * c + first * s).to(y.dtype.element_ty), mask=inside)
