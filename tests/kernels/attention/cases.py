"""Packed inputs and paged caches for the tests beside this file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Forms add up fp32 products in another order; the values are averages of numbers near 1.
FP32 = {"rtol": 1e-5, "atol": 2e-6}
# bf16 results may differ by a rounding of 8 bits, and fused kernels round their weights to bf16 as well.
BF16 = {"rtol": 2e-2, "atol": 2e-2}
# The same with 11 bits.
FP16 = {"rtol": 3e-3, "atol": 3e-3}
TOLERANCE = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}


def names(lengths: Sequence[int]) -> str:
    return "-".join(map(str, lengths)) or "none"


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_qkv(lengths: Sequence[int], *, heads: int = 6, kv_heads: int = 2, size: int = 16) -> list[Tensor]:
    return [torch.randn(sum(lengths), n, size) for n in (heads, kv_heads, kv_heads)]


class Paged(NamedTuple):
    """What ``paged_attention`` takes; the caches are NaN wherever no sequence wrote."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    indices: dict[str, Any]


def make_paged(
    lengths: Sequence[int],
    context_lens: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    block_size: int = 4,
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Paged:
    """Give random queries, keys and values; the blocks are shuffled, the tables have room to spare."""
    width = -(-max(context_lens, default=1) // block_size) + 1
    num_blocks = width * len(context_lens)
    tables = torch.randperm(num_blocks).view(len(context_lens), width)
    # Strided, heads before rows: the forms must not count on one layout.
    caches = torch.full((2, num_blocks, kv_heads, block_size, size), float("nan")).transpose(2, 3)
    for table, context in zip(tables, context_lens, strict=True):
        position = torch.arange(context)
        caches[:, table[position // block_size], position % block_size] = torch.randn(
            2, context, kv_heads, size
        )
    k_cache, v_cache = caches.to(dtype).to(device)
    indices = {
        "cu_seqlens": bounds(lengths).to(device),
        "lengths": lengths,
        "block_tables": tables.to(device),
        "context_lens": torch.tensor(context_lens, device=device),
        "context_starts": None if starts is None else torch.tensor(starts, device=device),
    }
    return Paged(torch.randn(sum(lengths), heads, size).to(dtype).to(device), k_cache, v_cache, indices)
