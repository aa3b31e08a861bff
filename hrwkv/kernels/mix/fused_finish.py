"""``finish`` in Triton: one launch forward and one backward; only what came in is kept between them.

One program handles a block of tokens of one head of v and walks the query heads that read it, so v is read
once and its gradient summed without atomics; r_k's gradient is summed over a block of tokens in the program
and over the blocks by torch: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrwkv.kernels.mix.naive import Mixed
from hrwkv.kernels.mix.tiles import load, store

NUM_WARPS = 4
BLOCK_SIZE = 2048  # elements of a tile: sixteen a thread, two loads of 16 bytes in bf16


@triton.jit
def locate_row(T, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr):
    """This program's block, head of v, first token; tokens, columns and mask, all of a tile [BT, KP]."""
    block = tl.program_id(0) // H_V
    start = block.to(tl.int64) * BT
    token = tl.broadcast_to(tl.arange(0, BT)[:, None], (BT, KP))
    column = tl.broadcast_to(tl.arange(0, KP)[None, :], (BT, KP))
    return block, tl.program_id(0) % H_V, start, token, column, (start + token < T) & (column < K)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    o, r, k, v, gate, r_k, y, T, scale, H: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Write y (12 to 14); without r_k no bonus, and r, k and v are not read."""
    block, v_head, start, token, column, live = locate_row(T, H_V, K, BT, KP)
    if r_k is not None:
        values = load(v, (start * H_V + v_head) * K + token * (H_V * K) + column, live)
    for group in range(H // H_V):
        head = v_head * (H // H_V) + group
        q = (start * H + head) * K + token * (H * K) + column
        x = load(o, q, live) * scale
        if r_k is not None:
            rk = load(r, q, live) * load(k, q, live)
            x += tl.sum(rk * load(r_k, head * K + column, live), 1)[:, None] * values
        store(y, q, x * load(gate, q, live), live)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    o, r, k, v, gate, r_k, dy, do, dr, dk, dv, dgate, dr_k, T, scale, H: tl.constexpr, H_V: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Write the gradients; dr_k: partial sums [blocks, H, K] fp32."""
    block, v_head, start, token, column, live = locate_row(T, H_V, K, BT, KP)
    if r_k is not None:
        kv = (start * H_V + v_head) * K + token * (H_V * K) + column
        values = load(v, kv, live)
        dvalues = tl.zeros((BT, KP), tl.float32)
        row = tl.arange(0, KP)
    for group in range(H // H_V):
        head = v_head * (H // H_V) + group
        q = (start * H + head) * K + token * (H * K) + column
        grad = load(dy, q, live)
        x = load(o, q, live) * scale
        dx = grad * load(gate, q, live)
        store(do, q, dx * scale, live)
        if r_k is not None:
            weight = load(r_k, head * K + column, live)
            receptance, key = load(r, q, live), load(k, q, live)
            bonus = tl.sum(receptance * key * weight, 1)[:, None]
            dbonus = tl.sum(dx * values, 1)[:, None]
            x += bonus * values
            dvalues += bonus * dx
            store(dr, q, dbonus * key * weight, live)
            store(dk, q, dbonus * receptance * weight, live)
            tl.store(dr_k + (block * H + head) * K + row, tl.sum(dbonus * receptance * key, 0), mask=row < K)
        store(dgate, q, grad * x, live)
    if r_k is not None:
        store(dv, kv, dvalues, live)


def finish(o: Tensor, mixed: Mixed, gate: Tensor, *, r_k: Tensor | None) -> Tensor:
    """The contract is ``hrwkv.kernels.mix.finish``'s; fp32 inside."""
    if r_k is None:
        return _Finish.apply(o, None, None, None, gate, None)
    return _Finish.apply(o, mixed.r, mixed.k, mixed.v, gate, r_k)


class _Finish(torch.autograd.Function):
    """The two launches, over o, r, k, v, gate and r_k; without a bonus r, k, v and r_k are None."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        tensors = tuple(None if x is None else x.contiguous() for x in tensors)
        ctx.save_for_backward(*tensors)
        o, _, _, v, *_ = tensors
        assert o is not None
        y = torch.empty_like(o)
        grid, sizes = _launch(o, v)
        with torch.cuda.device_of(o):
            forward_kernel[grid](*tensors, y, len(o), o.shape[2] ** -0.5, num_warps=NUM_WARPS, **sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        o, _, _, v, _, r_k = tensors = ctx.saved_tensors
        do, dr, dk, dv, dgate = (None if x is None else torch.empty_like(x) for x in tensors[:-1])
        grid, sizes = _launch(o, v)
        partial = None
        if r_k is not None:
            partial = r_k.new_empty(grid[0] // sizes["H_V"], r_k.numel(), dtype=torch.float32)
        with torch.cuda.device_of(o):
            backward_kernel[grid](
                *tensors,
                dy.contiguous(),
                do,
                dr,
                dk,
                dv,
                dgate,
                partial,
                len(o),
                o.shape[2] ** -0.5,
                num_warps=NUM_WARPS,
                **sizes,
            )
        dr_k = None if partial is None else partial.sum(0).view_as(r_k).to(r_k.dtype)
        return do, dr, dk, dv, dgate, dr_k


def _launch(o: Tensor, v: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """The grid, one program per block of tokens and head of v, and the constants of both kernels."""
    num_tokens, heads, size = o.shape
    v_heads = heads if v is None else v.shape[1]
    padded = triton.next_power_of_2(size)
    tokens = max(BLOCK_SIZE // padded, 1)
    sizes = {"H": heads, "H_V": v_heads, "K": size, "BT": tokens, "KP": padded}
    return (triton.cdiv(num_tokens, tokens) * v_heads,), sizes
