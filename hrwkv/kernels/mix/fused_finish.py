"""``finish`` in Triton: one launch forward and one backward; only what came in is kept between them.

One program handles a block of tokens of one head of v and walks the query heads that read it, so v is read
once and its gradient summed without atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrwkv.kernels.mix.tiles import load, store

NUM_WARPS = 4
STAGES = 3  # the next heads' rows are on their way while one is worked on
BLOCK_SIZE = 2048  # elements of a tile: sixteen a thread, two loads of 16 bytes in bf16


@triton.jit
def locate_row(T, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr):
    """This program's head of v, first token; tokens, columns and mask, all of a tile [BT, KP]."""
    start = (tl.program_id(0) // H_V).to(tl.int64) * BT
    token = tl.broadcast_to(tl.arange(0, BT)[:, None], (BT, KP))
    column = tl.broadcast_to(tl.arange(0, KP)[None, :], (BT, KP))
    return tl.program_id(0) % H_V, start, token, column, (start + token < T) & (column < K)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    o, v, bonus, gate, y, T, scale, H: tl.constexpr, H_V: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    KP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write y (12 to 14); without a bonus v is not read."""
    v_head, start, token, column, live = locate_row(T, H_V, K, BT, KP)
    rows = start + tl.arange(0, BT)
    if bonus is not None:
        values = load(v, (start * H_V + v_head) * K + token * (H_V * K) + column, live)
    for group in tl.range(0, H // H_V, num_stages=STAGES):
        head = v_head * (H // H_V) + group
        q = (start * H + head) * K + token * (H * K) + column
        x = load(o, q, live) * scale
        if bonus is not None:
            x += load(bonus, rows * H + head, rows < T)[:, None] * values
        store(y, q, x * load(gate, q, live), live)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    o, v, bonus, gate, dy, do, dv, dbonus, dgate, T, scale, H: tl.constexpr, H_V: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradients."""
    v_head, start, token, column, live = locate_row(T, H_V, K, BT, KP)
    rows = start + tl.arange(0, BT)
    if bonus is not None:
        kv = (start * H_V + v_head) * K + token * (H_V * K) + column
        values = load(v, kv, live)
        dvalues = tl.zeros((BT, KP), tl.float32)
    for group in tl.range(0, H // H_V, num_stages=STAGES):
        head = v_head * (H // H_V) + group
        q = (start * H + head) * K + token * (H * K) + column
        grad = load(dy, q, live)
        x = load(o, q, live) * scale
        dx = grad * load(gate, q, live)
        store(do, q, dx * scale, live)
        if bonus is not None:
            weight = load(bonus, rows * H + head, rows < T)[:, None]
            x += weight * values
            dvalues += weight * dx
            tl.store(dbonus + rows * H + head, tl.sum(dx * values, 1), mask=rows < T)
        store(dgate, q, grad * x, live)
    if bonus is not None:
        store(dv, kv, dvalues, live)


def finish(o: Tensor, v: Tensor, gate: Tensor, *, bonus: Tensor | None) -> Tensor:
    """The contract is ``hrwkv.kernels.mix.finish``'s; fp32 inside."""
    return _Finish.apply(o, None if bonus is None else v, bonus, gate)


class _Finish(torch.autograd.Function):
    """The two launches, over o, v, bonus and gate; without a bonus v and bonus are None."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        tensors = tuple(None if x is None else x.contiguous() for x in tensors)
        ctx.save_for_backward(*tensors)
        o, v, _, _ = tensors
        assert o is not None
        y = torch.empty_like(o)
        grid, sizes = _launch(o, v)
        with torch.cuda.device_of(o):
            forward_kernel[grid](*tensors, y, len(o), o.shape[2] ** -0.5, **sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        o, v, _, _ = tensors = ctx.saved_tensors
        grads = tuple(None if x is None else torch.empty_like(x) for x in tensors)
        grid, sizes = _launch(o, v)
        with torch.cuda.device_of(o):
            backward_kernel[grid](*tensors, dy.contiguous(), *grads, len(o), o.shape[2] ** -0.5, **sizes)
        return grads


def _launch(o: Tensor, v: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """The grid, one program per block of tokens and head of v, and the constants of both kernels."""
    num_tokens, heads, size = o.shape
    v_heads = heads if v is None else v.shape[1]
    padded = triton.next_power_of_2(size)
    tokens = max(BLOCK_SIZE // padded, 1)
    sizes = {"H": heads, "H_V": v_heads, "K": size, "BT": tokens, "KP": padded}
    sizes |= {"STAGES": STAGES, "num_warps": NUM_WARPS}
    return (triton.cdiv(num_tokens, tokens) * v_heads,), sizes
