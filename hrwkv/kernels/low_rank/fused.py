"""Several small products in one launch (Triton): a program takes some tokens and some columns of one of them.

Without a backward pass. Sums are fp32; an activation is computed in fp32 and rounded to the dtype, as the
separate operations do.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrwkv.kernels.low_rank.naive import Activation


class Launch(NamedTuple):
    """A program's tokens and columns, the ranks that it sums at a time, its warps and its stages of loads."""

    tokens: int
    columns: int
    ranks: int
    num_warps: int
    num_stages: int


def choose_launch(num_tokens: int, *, itemsize: int) -> Launch:
    """The cut for so many tokens of so many bytes an element; measured in benchmarks/results.

    Tokens of a program decide how often the weights are read, columns how often the inner products are, and
    their activations computed. Single precision has no tensor cores to fill.
    """
    if itemsize > 2:
        return Launch(16, 64, 64, num_warps=4, num_stages=3)
    return Launch(64, 128 if num_tokens <= 128 else 256, 32, num_warps=4, num_stages=4)


@torch.no_grad()
def expand(
    inner: Sequence[Tensor],
    up: Sequence[Tensor],
    *,
    activations: Sequence[Activation],
    launch: Launch | None = None,
) -> list[Tensor]:
    """The contract is ``hrwkv.kernels.low_rank.expand``'s, but for gradients."""
    tile = launch or choose_launch(len(inner[0]), itemsize=inner[0].element_size())
    out = [x.new_empty(len(x), w.shape[1]) for x, w in zip(inner, up, strict=True)]
    # The longest sums begin first, so that no program is alone at the end.
    longest_first = sorted(range(len(up)), key=lambda i: -len(up[i]))
    ours, inner, up = ([part[i] for i in longest_first] for part in (out, inner, up))
    starts = tuple(accumulate((triton.cdiv(w.shape[1], tile.columns) for w in up), initial=0))
    grid = (triton.cdiv(len(inner[0]), tile.tokens), starts[-1])
    with torch.cuda.device_of(inner[0]):
        _expand[grid](
            tuple(ours),
            tuple(inner),
            tuple(x.stride() for x in inner),
            tuple(up),
            tuple(w.stride() for w in up),
            tuple(tuple(w.shape) for w in up),  # a torch.Size is no tuple to Triton 3.6
            len(inner[0]),
            STARTS=starts,
            ACTIVATIONS=tuple(activations[i] for i in longest_first),
            BT=tile.tokens,
            BC=tile.columns,
            BR=tile.ranks,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _expand(
    out,  # [T, C] each
    inner,  # [T, R] each
    inner_strides,
    up,  # [R, C] each
    up_strides,
    shapes,  # (R, C) each
    num_tokens,
    STARTS: tl.constexpr,  # each product's first program, and the number of programs
    ACTIVATIONS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    token = tl.program_id(0) * BT + tl.arange(0, BT)  # the fastest axis: neighbours read the same weights
    program = tl.program_id(1)
    is_token = (token < num_tokens)[:, None]
    for i in tl.static_range(len(ACTIVATIONS)):
        if (program >= STARTS[i]) & (program < STARTS[i + 1]):
            column = (program - STARTS[i]) * BC + tl.arange(0, BC)
            is_column = (column < shapes[i][1])[None, :]
            total = tl.zeros([BT, BC], tl.float32)
            for start in range(0, shapes[i][0], BR):
                rank = start + tl.arange(0, BR)
                is_rank = rank < shapes[i][0]
                place = token[:, None] * inner_strides[i][0] + rank[None, :] * inner_strides[i][1]
                x = tl.load(inner[i] + place, mask=is_token & is_rank[None, :], other=0.0).to(tl.float32)
                if ACTIVATIONS[i] == "tanh":
                    x = 2 * tl.sigmoid(2 * x) - 1
                if ACTIVATIONS[i] == "sigmoid":
                    x = tl.sigmoid(x)
                place = rank[:, None] * up_strides[i][0] + column[None, :] * up_strides[i][1]
                w = tl.load(up[i] + place, mask=is_rank[:, None] & is_column, other=0.0)
                total = tl.dot(x.to(w.dtype), w, total, input_precision="ieee")
            place = token[:, None] * shapes[i][1] + column[None, :]
            tl.store(out[i] + place, total.to(out[i].dtype.element_ty), mask=is_token & is_column)
