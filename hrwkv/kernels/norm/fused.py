"""RMSNorm forward and backward in one launch each (Triton).

A program holds whole rows. Backward, a program walks over tiles of rows and keeps its part of the weight's
gradient, and the parts are added outside: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a tile: one long row, or several short ones (norms over a head).
TILE = 4096
# Programs of the backward pass that a multiprocessor holds at once.
RESIDENT = 4


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """The contract is ``hrwkv.kernels.norm.rms_norm``'s."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        num_rows = x.numel() // x.shape[-1]
        y = torch.empty_like(x)
        inverse = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        shape = _tile(x.shape[-1])
        _forward[(triton.cdiv(num_rows, shape["ROWS"]),)](
            x, weight, y, inverse, num_rows, x.shape[-1], eps, **shape
        )
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        num_rows, shape = len(inverse), _tile(x.shape[-1])
        num_tiles = triton.cdiv(num_rows, shape["ROWS"])
        programs = min(num_tiles, _programs(x.device))
        wants_weight = ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x)
        parts = (
            torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device) if wants_weight else None
        )
        _backward[(programs,)](
            x,
            weight,
            inverse,
            grad.contiguous(),
            grad_x,
            grad_x if parts is None else parts,
            num_rows,
            x.shape[-1],
            num_tiles,
            HAS_WEIGHT=wants_weight,
            **shape,
        )
        return grad_x, None if parts is None else parts.sum(0).to(weight.dtype), None


def _tile(width: int) -> dict[str, int]:
    """Tile and warps for rows of this width."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 8 if rows * block <= 8192 else 16}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _forward(
    x,  # [rows, D]
    weight,  # [D]
    y,  # [rows, D]
    inverse,  # [rows] fp32: 1 / sqrt(mean(x^2) + eps)
    num_rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = values * scale[:, None] * w[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale, mask=row < num_rows)


@triton.jit
def _backward(
    x,  # [rows, D]
    weight,  # [D]
    inverse,  # [rows] fp32
    grad,  # [rows, D], of y
    grad_x,  # [rows, D]
    parts,  # [programs, D] fp32: the weight's gradient over each program's rows
    num_rows,
    width,
    num_tiles,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        scale = tl.load(inverse + row, mask=row < num_rows, other=0.0)
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            total += tl.sum(slope * normed, 0)
        slope *= w[None, :]
        mean = tl.sum(slope * normed, 1) / width
        result = (slope - normed * mean[:, None]) * scale[:, None]
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        tl.store(parts + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)
