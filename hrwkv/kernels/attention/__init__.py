"""Causal attention over packed sequences and over a paged cache: arguments are checked here.

``naive`` is the definition, ``sdpa`` the form through PyTorch's fused attention that serves every device, and
``paged`` Triton's kernels for a cache on a GPU, where up to 16 new tokens of a sequence attend and nothing
wants a gradient. None knows a position encoding: queries and keys come with theirs, if they have one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hrwkv.kernels.attention import sdpa

_FEW = 16  # new tokens of a sequence that ``paged`` takes


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Attend causally inside each packed sequence with scale ``K**-0.5``, hxa079.md (15); differentiable.

    Args:
        q: ``[T, H, K]``, any floating dtype; the sequences follow one another.
        k: ``[T, H_kv, K]``, dtype of q; query head h reads key head ``h // (H / H_kv)``.
        v: ``[T, H_kv, K]``, dtype of q.
        cu_seqlens: ``[N + 1]`` int32, where each sequence starts and the last one ends.
        lengths: the N sequence lengths on the host (>= 0, their sum is T), so that nothing waits for a
            device.

    Returns:
        ``[T, H, K]`` in the dtype of q.

    Raises:
        ValueError: if shapes or lengths do not fit one another.
    """
    _check_heads(q, k, v, names=("k", "v"))
    if len(k) != len(q) or len(v) != len(q):
        raise ValueError(
            f"k and v hold {len(k)} and {len(v)} tokens, expected {len(q)}, as q: pack them alike"
        )
    _check_lengths(q, cu_seqlens=cu_seqlens, lengths=lengths)
    return sdpa.varlen_attention(q, k, v, cu_seqlens=cu_seqlens, lengths=lengths)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    block_tables: Tensor,
    context_lens: Tensor,
    contexts: Sequence[int] | None = None,
    context_starts: Tensor | None = None,
) -> Tensor:
    """Attend from new tokens to a paged cache that already holds them, causally, aligned bottom-right.

    Args:
        q: ``[T, H, K]`` new tokens, packed.
        k_cache: ``[blocks, block_size, H_kv, K]``, any strides.
        v_cache: ``[blocks, block_size, H_kv, K]``, any strides.
        cu_seqlens: ``[N + 1]`` int32, where each sequence's new tokens start and the last ones end.
        lengths: the N numbers of new tokens, on the host (>= 0, their sum is T).
        block_tables: ``[N, M]`` int64, each sequence's blocks in order; entries past its context are not
            read as content and may be anything up to the number of blocks. On a GPU M sets the cost of more
            than 16 new tokens without ``contexts``, which copy all M blocks: trim it, or give them.
        context_lens: ``[N]`` tokens in the cache of each sequence, the new ones included; 0 for a sequence
            that only fills a place in a CUDA graph: its one token gives zeros.
        contexts: the same on the host, if it is known there: it saves a GPU copies, a mask and calls.
        context_starts: ``[N]`` first cached token that may be attended, 0 for None; a query before it gives
            zeros.

    Returns:
        ``[T, H, K]`` in the dtype of q.

    Raises:
        ValueError: if shapes or lengths do not fit one another.
    """
    _check_heads(q, k_cache, v_cache, names=("k_cache", "v_cache"))
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache have shapes {list(k_cache.shape)} and {list(v_cache.shape)}, expected one "
            "shape [blocks, block size, KV heads, key size]"
        )
    _check_lengths(q, cu_seqlens=cu_seqlens, lengths=lengths)
    if block_tables.dim() != 2 or len(block_tables) != len(lengths):
        raise ValueError(
            f"block_tables has shape {list(block_tables.shape)}, expected [{len(lengths)}, blocks]"
        )
    for name, x in (("context_lens", context_lens), ("context_starts", context_starts)):
        if x is not None and x.shape != (len(lengths),):
            raise ValueError(f"{name} has shape {list(x.shape)}, expected [{len(lengths)}]: one per sequence")
    packed = contexts if context_starts is None and sdpa.takes_contexts(q) else None
    outputs = []
    for run in _runs(lengths, few=_FEW if q.is_cuda else 1, together=packed is not None):
        first, last = sum(lengths[: run.start]), sum(lengths[: run.stop])
        bounds = cu_seqlens[run.start : run.stop + 1]
        tables = block_tables[run]
        if contexts is not None:
            tables = tables[:, : -(-max(contexts[run], default=0) // k_cache.shape[1])]
        outputs.append(
            _attend_paged(
                q[first:last],
                k_cache,
                v_cache,
                cu_seqlens=bounds - first if first else bounds,  # a decode step launches nothing for this
                lengths=lengths[run],
                block_tables=tables,
                context_lens=context_lens[run],
                contexts=None if packed is None else packed[run],
                context_starts=None if context_starts is None else context_starts[run],
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    block_tables: Tensor,
    context_lens: Tensor,
    contexts: Sequence[int] | None,
    context_starts: Tensor | None,
) -> Tensor:
    """``paged_attention`` by the form for the device and the lengths; contexts where varlen_attn serves."""
    indices: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "lengths": lengths,
        "block_tables": block_tables,
        "context_lens": context_lens,
    }
    if q.is_cuda:
        from hrwkv.kernels.attention import paged  # here, for Triton comes with a GPU's torch only

        if paged.is_supported(q, k_cache, v_cache, lengths=lengths):
            return paged.paged_attention(q, k_cache, v_cache, context_starts=context_starts, **indices)
    if contexts is not None:
        return sdpa.paged_varlen_attention(q, k_cache, v_cache, contexts=contexts, **indices)
    return sdpa.paged_attention(q, k_cache, v_cache, context_starts=context_starts, **indices)


@torch.no_grad()
def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor) -> None:
    """Write new keys and values into a paged cache, in place; not differentiable.

    Args:
        k: ``[T, H_kv, K]``.
        v: ``[T, H_kv, K]``.
        k_cache: ``[blocks, block_size, H_kv, K]``, any strides and dtype.
        v_cache: ``[blocks, block_size, H_kv, K]``, any strides and dtype.
        slot_mapping: ``[T]`` int64; token t goes to block ``slot // block_size``, row ``slot % block_size``,
            and nowhere if its slot is negative (padding).

    Raises:
        ValueError: if shapes do not fit one another.
    """
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.dim() != 3 or cache.dim() != 4 or x.shape[1:] != cache.shape[2:]:
            raise ValueError(
                f"{name} has shape {list(x.shape)} and its cache {list(cache.shape)}, expected [tokens, "
                "KV heads, key size] and [blocks, block size, KV heads, key size]"
            )
    if k.shape != v.shape or slot_mapping.shape != (len(k),):
        raise ValueError(
            f"k, v and slot_mapping have shapes {list(k.shape)}, {list(v.shape)} and "
            f"{list(slot_mapping.shape)}, expected as many slots as tokens"
        )
    store = sdpa.store_kv
    if k.is_cuda:
        from hrwkv.kernels.attention import paged  # here, for Triton comes with a GPU's torch only

        store = paged.store_kv
    store(k, v, k_cache, v_cache, slot_mapping=slot_mapping)


def _runs(lengths: Sequence[int], *, few: int, together: bool) -> list[slice]:
    """Neighbours that attend in one call: those of at most ``few`` tokens, and those of one length.

    With a mask all in one call are as wide as the longest, so a prompt must not share one with the next
    tokens of others. Where the form packs them, all of more than ``few`` go ``together``.
    """
    kinds = [0 if length <= few else 1 if together else length for length in lengths]
    starts = [n for n, kind in enumerate(kinds) if not n or kind != kinds[n - 1]]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(kinds)], strict=True)] or [slice(0, 0)]


def _check_heads(q: Tensor, k: Tensor, v: Tensor, *, names: tuple[str, str]) -> None:
    """Refuse keys or values whose heads or sizes do not fit q."""
    if q.dim() != 3:
        raise ValueError(
            f"q has shape {list(q.shape)}, expected [tokens, heads, key size]: pack the sequences"
        )
    for name, x in zip(names, (k, v), strict=True):
        if x.dim() < 3 or x.shape[-1] != q.shape[-1] or x.shape[-2] == 0 or q.shape[1] % x.shape[-2]:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected key size {q.shape[-1]} and a number of KV heads "
                f"that divides the {q.shape[1]} heads of q"
            )


def _check_lengths(q: Tensor, *, cu_seqlens: Tensor, lengths: Sequence[int]) -> None:
    """Refuse lengths that do not add up to the tokens of q."""
    if min(lengths, default=0) < 0 or sum(lengths) != len(q):
        raise ValueError(
            f"lengths have sum {sum(lengths)}, but q holds {len(q)} tokens: give one length >= 0 per "
            "sequence, together the number of packed tokens"
        )
    if cu_seqlens.shape != (len(lengths) + 1,):
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [{len(lengths) + 1}]")
