"""Rows into 8 bits in one launch each (Triton): a program takes a row, twice.

The first walk finds the row's largest element, the second one, backwards, computes the elements again and
stores them; it finds most of the row in the cache. As tensor operations the same work is five to eight passes
over the MLP's widest tensors. ``transpose`` exists because Hopper multiplies 8-bit matrices only along their
contiguous axis, and the gradient needs the other one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrwkv.kernels.swiglu.fused import gate_gradients, silu

ROUNDED = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)  # of ROUNDED
BLOCK = 2048
TILE = 64


def quantise_rows(
    x: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The contract is ``naive.quantise_rows``'s; dtype is float8_e4m3fn."""
    assert dtype == torch.float8_e4m3fn
    x = x.contiguous()
    values, scale = _empty_rows(x)
    _quantise_rows[(len(x),)](
        x,
        x if columns is None else columns,
        values,
        scale,
        x.shape[1],
        HAS_COLUMNS=columns is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return values, scale


def swiglu_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The contract is ``naive.swiglu_rows``'s."""
    values, scale = _empty_rows(gate)
    _swiglu_rows[(len(gate),)](gate, up, values, scale, gate.shape[1], BLOCK=BLOCK, num_warps=8)
    return values, scale


def swiglu_gradient_rows(
    grad: Tensor, gate: Tensor, up: Tensor, *, gate_columns: Tensor, up_columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract is ``naive.swiglu_gradient_rows``'s."""
    (for_gate, gate_scale), (for_up, up_scale) = _empty_rows(gate), _empty_rows(up)
    _swiglu_gradient_rows[(len(gate),)](
        grad.contiguous(),
        gate,
        up,
        gate_columns,
        up_columns,
        for_gate,
        gate_scale,
        for_up,
        up_scale,
        gate.shape[1],
        BLOCK=BLOCK,
        num_warps=8,
    )
    return for_gate, gate_scale, for_up, up_scale


def transpose(values: Tensor) -> Tensor:
    """[N, K] of one byte an element -> [K, N], contiguous."""
    num_rows, num_columns = values.shape
    out = torch.empty(num_columns, num_rows, dtype=values.dtype, device=values.device)
    grid = (triton.cdiv(num_rows, TILE) * triton.cdiv(num_columns, TILE),)
    _transpose[grid](values.view(torch.uint8), out.view(torch.uint8), num_rows, num_columns, TILE=TILE)
    return out


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=ROUNDED, device=x.device)
    return values, torch.empty(len(x), dtype=torch.float32, device=x.device)


@triton.jit
def _scale_of(largest):
    """The scale of a row, from the largest elements [BLOCK] of its lanes."""
    whole = tl.max(largest, 0)
    return tl.where(whole > 0, whole / LARGEST, 1.0)


@triton.jit
def _load(pointer, column, width):
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, column, width, x):
    tl.store(pointer + column, x.to(pointer.dtype.element_ty), mask=column < width)


@triton.jit
def _times_columns(x, columns, column, width, HAS_COLUMNS: tl.constexpr):
    if HAS_COLUMNS:
        x *= _load(columns, column, width)
    return x


@triton.jit
def _quantise_rows(
    x,  # [T, K]
    columns,  # [K] fp32
    values,  # [T, K] 8 bits
    scale,  # [T] fp32
    width,
    HAS_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * width
    values += row * width
    lanes = tl.arange(0, BLOCK)
    num_tiles = tl.cdiv(width, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, num_tiles):
        column = tile * BLOCK + lanes
        part = _times_columns(_load(x, column, width), columns, column, width, HAS_COLUMNS)
        largest = tl.maximum(largest, tl.abs(part))
    row_scale = _scale_of(largest)
    tl.store(scale + row, row_scale)
    for step in range(0, num_tiles):
        column = (num_tiles - 1 - step) * BLOCK + lanes
        part = _times_columns(_load(x, column, width), columns, column, width, HAS_COLUMNS)
        _store(values, column, width, part / row_scale)


@triton.jit
def _swiglu_rows(
    gate,  # [T, I]
    up,  # [T, I]
    values,  # [T, I] 8 bits
    scale,  # [T] fp32
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gate += row * width
    up += row * width
    values += row * width
    lanes = tl.arange(0, BLOCK)
    num_tiles = tl.cdiv(width, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, num_tiles):
        column = tile * BLOCK + lanes
        product = silu(_load(gate, column, width)) * _load(up, column, width)
        largest = tl.maximum(largest, tl.abs(product))
    row_scale = _scale_of(largest)
    tl.store(scale + row, row_scale)
    for step in range(0, num_tiles):
        column = (num_tiles - 1 - step) * BLOCK + lanes
        product = silu(_load(gate, column, width)) * _load(up, column, width)
        _store(values, column, width, product / row_scale)


@triton.jit
def _swiglu_gradients(grad, gate, up, gate_columns, up_columns, column, width):
    """A tile of both gradients times their columns, fp32 [BLOCK] each."""
    for_gate, for_up = gate_gradients(
        _load(grad, column, width), _load(gate, column, width), _load(up, column, width)
    )
    return for_gate * _load(gate_columns, column, width), for_up * _load(up_columns, column, width)


@triton.jit
def _swiglu_gradient_rows(
    grad,  # [T, I]
    gate,  # [T, I]
    up,  # [T, I]
    gate_columns,  # [I] fp32
    up_columns,  # [I] fp32
    gate_values,  # [T, I] 8 bits
    gate_scale,  # [T] fp32
    up_values,  # [T, I] 8 bits
    up_scale,  # [T] fp32
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad += row * width
    gate += row * width
    up += row * width
    gate_values += row * width
    up_values += row * width
    lanes = tl.arange(0, BLOCK)
    num_tiles = tl.cdiv(width, BLOCK)
    largest_gate = tl.zeros([BLOCK], tl.float32)
    largest_up = tl.zeros([BLOCK], tl.float32)
    for tile in range(0, num_tiles):
        column = tile * BLOCK + lanes
        for_gate, for_up = _swiglu_gradients(grad, gate, up, gate_columns, up_columns, column, width)
        largest_gate = tl.maximum(largest_gate, tl.abs(for_gate))
        largest_up = tl.maximum(largest_up, tl.abs(for_up))
    row_gate_scale = _scale_of(largest_gate)
    row_up_scale = _scale_of(largest_up)
    tl.store(gate_scale + row, row_gate_scale)
    tl.store(up_scale + row, row_up_scale)
    for step in range(0, num_tiles):
        column = (num_tiles - 1 - step) * BLOCK + lanes
        for_gate, for_up = _swiglu_gradients(grad, gate, up, gate_columns, up_columns, column, width)
        _store(gate_values, column, width, for_gate / row_gate_scale)
        _store(up_values, column, width, for_up / row_up_scale)


@triton.jit
def _transpose(
    source,  # [N, K] bytes
    target,  # [K, N] bytes
    num_rows,
    num_columns,
    TILE: tl.constexpr,
):
    tiles_across = tl.cdiv(num_columns, TILE)
    tile_row = tl.program_id(0) // tiles_across
    tile_column = tl.program_id(0) % tiles_across
    row = (tile_row * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (tile_column * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    x = tl.load(source + row[:, None] * num_columns + column[None, :], mask=inside)
    inside_target = (column < num_columns)[:, None] & (row < num_rows)[None, :]
    tl.store(target + column[:, None] * num_rows + row[None, :], tl.trans(x), mask=inside_target)
