"""Causal attention as it is defined: one dense fp32 softmax per sequence.

This is the reference that the faster forms are tested against. It builds every score matrix whole, and
loops over the sequences on the host. It leaves out every check of its arguments:
``hrwkv.kernels.attention`` holds those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, start: int = 0) -> Tensor:
    """Attend from the last L of S positions to all earlier ones, hxa079.md (15).

    Args:
        q: ``[L, H, K]``; query i stands at position S - L + i.
        k: ``[S, H_kv, K]``; query head h reads key head ``h // (H / H_kv)``.
        v: ``[S, H_kv, K]``.
        start: positions before it are never attended; a query with nothing to attend gives zeros.
    """
    length, context, group = len(q), len(k), q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))  # [S, H, K]
    scores = torch.einsum("lhk,shk->hls", q.to(dtype), k) * q.shape[-1] ** -0.5
    position = torch.arange(context - length, context, device=q.device).unsqueeze(1)
    key_position = torch.arange(context, device=q.device)
    allowed = (key_position <= position) & (key_position >= start)  # [L, S]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~allowed, 0.0)
    return torch.einsum("hls,shk->lhk", weights, v).to(q.dtype)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Attend inside each packed sequence; the contract is ``hrwkv.kernels.attention.varlen_attention``'s."""
    sizes = list(lengths)
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([attend(*part) for part in parts]) if sizes else q.clone()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    block_tables: Tensor,
    context_lens: Tensor,
    context_starts: Tensor | None = None,
) -> Tensor:
    """Attend to a paged cache; the contract is ``hrwkv.kernels.attention.paged_attention``'s."""
    outputs = []
    for n, q_n in enumerate(q.split(list(lengths))):
        context = int(context_lens[n])
        block_size = k_cache.shape[1]
        blocks = block_tables[n, : -(-context // block_size)]
        k, v = (cache[blocks].flatten(0, 1)[:context] for cache in (k_cache, v_cache))  # [S, H_kv, K]
        start = 0 if context_starts is None else int(context_starts[n])
        outputs.append(attend(q_n, k, v, start=start))
    return torch.cat(outputs) if outputs else q.clone()


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor) -> None:
    """Write each token's key and value; the contract is ``hrwkv.kernels.attention.store_kv``'s."""
    block_size = k_cache.shape[1]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        k_cache[slot // block_size, slot % block_size] = k[t]
        v_cache[slot // block_size, slot % block_size] = v[t]
