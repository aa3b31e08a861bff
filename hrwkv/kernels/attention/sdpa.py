"""Packed and paged causal attention through PyTorch's fused attention.

Packed: sequences of one length become a batch by a view. Otherwise the CPU runs one call per sequence, and a
GPU one call for all whose lengths are given, so that nothing waits for the device: varlen_attn in half
precision, a jagged nested tensor in fp32, which varlen_attn does not take. In half precision no KV head is
repeated.
Paged: blocks are gathered, which copies each context once a call. The products of a prefill outweigh that;
for a few new tokens ``paged`` reads the blocks in place. In half precision on a GPU contexts are packed for
varlen_attn where their lengths are known on the host; else they become a padded batch with a mask.
"""

import functools
import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_HALF = (torch.float16, torch.bfloat16)
# torch 2.11 takes fewer KV than query heads unasked, later versions want to be told.
_grouped_varlen_attn = (
    functools.partial(varlen_attn, enable_gqa=True)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters
    else varlen_attn
)


def takes_varlen(q: Tensor) -> bool:
    """Tell whether varlen_attn takes such queries: half precision on a GPU, a key size that it vectorises."""
    return q.is_cuda and q.dtype in _HALF and q.shape[-1] % 8 == 0


def takes_contexts(q: Tensor) -> bool:
    """Tell whether ``paged_varlen_attention`` takes such queries: NVIDIA's kernels align bottom-right."""
    return takes_varlen(q) and torch.version.hip is None  # AMD's were not tried with fewer queries than keys


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Attend inside each packed sequence; the contract is ``hrwkv.kernels.attention.varlen_attention``'s."""
    present = [length for length in lengths if length > 0]
    if not present:
        return q.clone()  # empty too, and still part of the graph
    # H100, K = 96, ms forward / with backward: 8 x 4096 cuDNN 4.2 / 14.9, varlen_attn 4.9 / 21.1; 1 x 32768
    # 28.7 / 101, 38.2 / 155; 32768 in ten lengths varlen_attn 7.3 / 29.3, jagged 7.7 / 30.6.
    if min(present) == max(present):
        return _attend_causal(*(x.unflatten(0, (len(present), present[0])) for x in (q, k, v))).flatten(0, 1)
    if takes_varlen(q):
        ends, longest = cu_seqlens, max(present)
        return _attend_varlen(q, k, v, cu_seq_q=ends, cu_seq_k=ends, max_q=longest, max_k=longest)
    if q.is_cuda and q.dtype != torch.float64:
        return _attend_jagged(q, k, v, offsets=cu_seqlens, lengths=lengths)
    parts = zip(q.split(present), k.split(present), v.split(present), strict=True)
    outputs = [_attend_causal(*(x.unsqueeze(0) for x in part)).squeeze(0) for part in parts]
    return torch.cat(outputs)


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
    """Attend with a mask; the contract is ``hrwkv.kernels.attention.paged_attention``'s."""
    if not len(q):
        return q.clone()  # empty too, and still part of the graph
    longest, block_size = max(lengths), k_cache.shape[1]
    if not block_tables.is_cuda:  # reading the device would stall a GPU, there the caller trims the tables
        block_tables = block_tables[:, : -(-int(context_lens.max()) // block_size)]
    key_position = torch.arange(block_tables.shape[1] * block_size, device=q.device)  # [S]
    written = key_position < context_lens.unsqueeze(1)  # [N, S]
    k, v = (_gather_blocks(cache, block_tables, written=written) for cache in (k_cache, v_cache))

    step = torch.arange(longest, device=q.device)
    first = context_lens - cu_seqlens.diff()  # [N], position of each sequence's first query
    position = (first.unsqueeze(1) + step).unsqueeze(2)  # [N, L, 1]
    allowed = key_position <= position
    if context_starts is not None:
        allowed &= key_position >= context_starts.view(-1, 1, 1)
    if min(lengths) == longest:
        return _attend_masked(q.unflatten(0, (len(lengths), longest)), k, v, allowed=allowed).flatten(0, 1)
    row = (cu_seqlens[:-1].unsqueeze(1) + step).clamp(
        max=len(q) - 1
    )  # rows past a sequence's end are dropped
    o = _attend_masked(q[row], k, v, allowed=allowed)  # [N, L, H, K]
    sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=len(q))  # [T]
    return o[sequence, torch.arange(len(q), device=q.device) - cu_seqlens[sequence]]


def paged_varlen_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    block_tables: Tensor,
    context_lens: Tensor,
    contexts: Sequence[int],
) -> Tensor:
    """Attend without mask or repeated heads where ``takes_contexts``; the contract is ``paged_attention``'s.

    contexts: ``context_lens`` on the host, so that nothing waits for the device.
    """
    if not len(q):
        return q.clone()  # empty too, and still part of the graph
    # H200, ms, 2048 tokens at the end of 16384, K = 96 / 128 / 64: 2.27 / 3.00 / 1.74; with a mask
    # 4.00 / 4.22 / 2.81. cuDNN over the earlier tokens and over the new ones, joined by their sums:
    # 1.75 / 1.84 / 1.26, but it takes 85 ms to prepare each new shape, and prompts seldom end alike.
    k, v = (
        _pack_contexts(cache, block_tables, contexts=contexts).to(q.dtype) for cache in (k_cache, v_cache)
    )
    ends = F.pad(context_lens.cumsum(0), (1, 0)).int()
    return _attend_varlen(
        q, k, v, cu_seq_q=cu_seqlens, cu_seq_k=ends, max_q=max(lengths), max_k=max(contexts)
    )


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor) -> None:
    """Write each token's key and value; the contract is ``hrwkv.kernels.attention.store_kv``'s."""
    block_size, used = k_cache.shape[1], slot_mapping >= 0
    slots = slot_mapping[used]
    place = (slots // block_size, slots % block_size)
    k_cache.index_put_(place, k[used].to(k_cache.dtype))
    v_cache.index_put_(place, v[used].to(v_cache.dtype))


def _attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally in a batch: q ``[N, L, H, K]``, k and v ``[N, L, H_kv, K]``, result as q."""
    # On a GPU only the kernels for half precision without a mask group heads.
    q, k, v, grouped = _match_heads(q, k, v, repeat=q.is_cuda and q.dtype not in _HALF)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Attend in one call over different lengths: q ``[T, H, K]``, k and v ``[S, H_kv, K]``.

    FlashAttention-2's causality is aligned bottom-right: a sequence's last query sees its last key.
    """
    o = _grouped_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))
    assert isinstance(o, Tensor)  # it gives more only where more is asked for
    return o


def _match_heads(q: Tensor, k: Tensor, v: Tensor, *, repeat: bool) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Put heads before time, and repeat KV heads where the device's fused kernel cannot group them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1 and repeat:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        group = 1
    return q, k, v, group > 1


def _attend_jagged(q: Tensor, k: Tensor, v: Tensor, *, offsets: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend in one call over different lengths on a GPU: q ``[T, H, K]``, k and v ``[T, H_kv, K]``."""
    group = q.shape[1] // k.shape[1]
    if group > 1:  # fused kernels refuse gradients through broadcast heads of nested tensors
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if min(lengths) == 0:  # the fused kernels refuse empty sequences
        keep = [0] + [n + 1 for n, length in enumerate(lengths) if length > 0]
        offsets = offsets[torch.tensor(keep).pin_memory().to(q.device, non_blocking=True)]
        lengths = [length for length in lengths if length > 0]
    shortest, longest = min(lengths), max(lengths)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        for x in (q, k, v)
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2).values()


def _pack_contexts(cache: Tensor, block_tables: Tensor, *, contexts: Sequence[int]) -> Tensor:
    """Copy each sequence's tokens behind one another: ``[sum(contexts), H_kv, K]``, no unused row."""
    block_size = cache.shape[1]
    pairs = zip(block_tables, contexts, strict=True)
    parts = [cache[table[: -(-context // block_size)]].flatten(0, 1)[:context] for table, context in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather_blocks(cache: Tensor, block_tables: Tensor, *, written: Tensor) -> Tensor:
    """Copy each sequence's blocks behind one another: ``[N, S, H_kv, K]``, zeros where nothing was written.

    The zeros matter: a masked weight of 0 times a NaN that fresh memory may hold is still NaN.
    """
    gathered = cache[block_tables.clamp(min=0)].flatten(1, 2)
    return gathered.masked_fill_(~written[..., None, None], 0.0)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor) -> Tensor:
    """Attend where ``allowed [N, L, S]``: q and result ``[N, L, H, K]``, k and v ``[N, S, H_kv, K]``."""
    anything = allowed.any(dim=-1, keepdim=True)
    # Left padding has nothing to attend: let it attend everything, then return zeros instead of NaN.
    mask = (allowed | ~anything).unsqueeze(1)  # [N, 1, L, S]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.shape[1] == 1:
        # Decode: the queries that share a KV head become the rows of one product, no head is repeated.
        rows = q.squeeze(1).unflatten(1, (k.shape[2], -1))  # [N, H_kv, H / H_kv, K]
        mask = mask.expand(-1, -1, rows.shape[2], -1)
        o = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        o = o.flatten(1, 2).unsqueeze(1)
    else:
        q, k, v, grouped = _match_heads(q, k, v, repeat=q.is_cuda)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
    return o.masked_fill(~anything.unsqueeze(-1), 0.0)
