"""Attention to a paged cache and the store into it, in Triton: blocks are read and written where they lie.

The query heads of one KV head and the new tokens of one sequence are the rows of one program's products, so
every cached key and value is read once. A long context is split among several programs (Flash-Decoding,
https://pytorch.org/blog/flash-decoding), whose results a second kernel combines: without atomics, so the same
inputs give the same bits. A grid depends on shapes alone and nothing is read back, so a CUDA graph may record
the launches.

Key sizes are cut into parts that are powers of two (96 is 64 + 32): Triton knows no other tiles, and padding
96 to 128 would cost a third more work. Gradients, and prefill with many tokens, are left to ``sdpa``.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_NEW_TOKENS = 16  # of a sequence; with more, products take longer than the copy of the cache saves

_TILE = 64  # cached tokens read at a time, half as many in fp32
_STAGES = 4 if torch.version.hip is None else 3  # tiles on their way; AMD's shared memory holds fewer
_WARPS = 4
_MAX_ROWS = 64  # query rows of a program, 16 in fp32; more take more programs, and each reads the cache
_PROGRAMS = 4 * 132  # run at the same time on an H100 or H200; elsewhere the number costs speed only
_MIN_SPLIT = 4  # tiles; fewer are not worth the start of a program
_STORE_ROWS = 32


def is_supported(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, lengths: Sequence[int]) -> bool:
    """Tell whether ``paged_attention`` here takes the arguments: few new tokens, no gradient, a fitting K."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache))
    fits = q.shape[-1] % 16 == 0 and q.shape[-1] <= 128 and q.dtype != torch.float64
    return fits and not wants_gradient and max(lengths, default=0) <= MAX_NEW_TOKENS


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
    (num_tokens, num_heads, size), (_, block_size, num_kv_heads, _) = q.shape, k_cache.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not num_tokens:
        return o
    group = num_heads // num_kv_heads
    half = q.dtype != torch.float32
    tile, max_rows = (_TILE, _MAX_ROWS) if half else (_TILE // 2, 16)
    num_rows = max(lengths) * group
    rows = min(max(triton.next_power_of_2(num_rows), 16), max_rows)  # a product has at least 16
    grid = (num_kv_heads * triton.cdiv(num_rows, rows), len(lengths))
    num_splits = _num_splits(math.prod(grid), tiles=triton.cdiv(block_tables.shape[1] * block_size, tile))
    split_o, lse = o, None
    if num_splits > 1:
        split_o = q.new_empty((num_splits, *q.shape), dtype=torch.float32)
        lse = q.new_empty((num_splits, num_tokens, num_heads), dtype=torch.float32)
    _attend_kernel[(*grid, num_splits)](
        q,
        k_cache,
        v_cache,
        split_o,
        lse,
        cu_seqlens,
        block_tables,
        context_lens,
        context_starts,
        q.stride(),
        k_cache.stride(),
        v_cache.stride(),
        block_tables.stride(),
        num_tokens,
        block_size,
        num_splits,
        size**-0.5 * math.log2(math.e),
        HEADS=num_heads,
        GROUP=group,
        K=size,
        PARTS=_parts(size),
        ROWS=rows,
        TILE=tile,
        TILE_IN_BLOCK=block_size % tile == 0,
        MIN_SPLIT=_MIN_SPLIT,
        HALF=half and q.is_cuda,  # the interpreter multiplies fp32 only
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    if lse is not None:
        _combine_kernel[(num_tokens * num_heads,)](
            split_o,
            lse,
            o,
            num_splits,
            SPLITS=triton.next_power_of_2(num_splits),
            K=size,
            PARTS=_parts(size),
            num_warps=1 if num_splits <= 8 else 4,
        )
    return o


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor) -> None:
    """Write each token's key and value; the contract is ``hrwkv.kernels.attention.store_kv``'s."""
    num_tokens, num_kv_heads, size = k.shape
    if not num_tokens:
        return
    _store_kernel[(triton.cdiv(num_tokens * num_kv_heads, _STORE_ROWS),)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(),
        v.stride(),
        k_cache.stride(),
        v_cache.stride(),
        num_tokens,
        k_cache.shape[1],
        HEADS=num_kv_heads,
        K=size,
        PARTS=_parts(size),
        ROWS=_STORE_ROWS,
        num_warps=_WARPS,
    )


def _parts(size: int) -> tuple[tuple[int, int], ...]:
    """Cut a key size into powers of two of at most 64, largest first: where each starts and its width."""
    parts: list[tuple[int, int]] = []
    while (first := sum(width for _, width in parts)) < size:
        parts.append((first, min(64, 1 << (size - first).bit_length() - 1)))
    return tuple(parts)


def _num_splits(programs: int, *, tiles: int) -> int:
    """Choose among how many programs a context of so many tiles is split, given the programs without a split.

    Few programs are split to fill the GPU once and so to end together. Many are split until they fill it four
    times, so that the last round, which does not fill it, weighs little.
    """
    wanted = _PROGRAMS // programs if 4 * programs <= _PROGRAMS else triton.cdiv(4 * _PROGRAMS, programs)
    return min(wanted, max(triton.cdiv(tiles, _MIN_SPLIT), 1))


@triton.jit(do_not_specialize=["num_tokens", "block_size", "num_splits"])
def _attend_kernel(
    q,
    k_cache,
    v_cache,
    o,
    lse,
    cu_seqlens,
    block_tables,
    context_lens,
    context_starts,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    num_tokens,
    block_size,
    num_splits,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILE_IN_BLOCK: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    HALF: tl.constexpr,
):
    """Attend from one KV head's queries of one sequence to one split of its context, hxa079.md (15).

    Program (rows of a KV head, sequence, split). With ``lse`` it writes o ``[splits, T, H, K]`` fp32, normed
    within the split, and lse ``[splits, T, H]`` fp32, the base-2 logarithm of its sum, -inf where it saw
    nothing (o stays unwritten there); without, o ``[T, H, K]``. ``scale`` counts in powers of two.
    """
    operand: tl.constexpr = q.dtype.element_ty if HALF else tl.float32
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head, sequence, split = tl.program_id(0) % KV_HEADS, tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    step, head = row // GROUP, kv_head * GROUP + row % GROUP
    first_token = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first_token
    token = first_token + step
    is_query = step < length

    context = tl.load(context_lens + sequence).to(tl.int32)
    start = 0
    if context_starts is not None:
        start = tl.load(context_starts + sequence).to(tl.int32)
    last_position = context - length + step  # a query sees itself and what is before
    first_tile, end_tile = start // TILE, tl.cdiv(context, TILE)
    split_tiles = tl.maximum(tl.cdiv(end_tile - first_tile, num_splits), MIN_SPLIT)
    first_tile += split * split_tiles
    end_tile = tl.minimum(first_tile + split_tiles, end_tile)

    queries: tl.tuple = ()
    acc: tl.tuple = ()
    q_row = q + token.to(tl.int64) * q_stride[0] + head * q_stride[1]
    for part in tl.static_range(len(PARTS)):
        column = PARTS[part][0] + tl.arange(0, PARTS[part][1])
        x = tl.load(q_row[:, None] + column * q_stride[2], mask=is_query[:, None], other=0.0)
        queries, acc = queries + (x.to(operand),), acc + (tl.zeros(x.shape, tl.float32),)
    largest = tl.full([ROWS], -1e30, tl.float32)  # finite: -inf minus -inf would be NaN
    total = tl.zeros([ROWS], tl.float32)
    block_tables += sequence * table_stride[0]
    k_cache += kv_head * k_stride[2]
    v_cache += kv_head * v_stride[2]

    for tile in range(first_tile, end_tile):
        position = tile * TILE + tl.arange(0, TILE)
        written = (position >= start) & (position < context)
        if TILE_IN_BLOCK:
            block = tl.load(block_tables + tile * TILE // block_size * table_stride[1])
            place = tile * TILE % block_size + tl.arange(0, TILE)
        else:
            entry = block_tables + position // block_size * table_stride[1]
            block = tl.load(entry, mask=written, other=0)
            place = position % block_size
        k_row = k_cache + block.to(tl.int64) * k_stride[0] + place.to(tl.int64) * k_stride[1]
        v_row = v_cache + block.to(tl.int64) * v_stride[0] + place.to(tl.int64) * v_stride[1]

        scores = tl.zeros([ROWS, TILE], tl.float32)
        for part in tl.static_range(len(PARTS)):
            key = k_row[:, None] + (PARTS[part][0] + tl.arange(0, PARTS[part][1])) * k_stride[3]
            key = tl.load(key, mask=written[:, None], other=0.0).to(operand)
            scores = tl.dot(queries[part], tl.trans(key), scores, input_precision="ieee")
        allowed = written & (position <= last_position[:, None])
        scores = tl.where(allowed, scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger
        sums: tl.tuple = ()
        for part in tl.static_range(len(PARTS)):
            # Masked, for a weight of 0 times the NaN that fresh memory may hold is NaN.
            value = v_row[:, None] + (PARTS[part][0] + tl.arange(0, PARTS[part][1])) * v_stride[3]
            value = tl.load(value, mask=written[:, None], other=0.0).to(operand)
            scaled = acc[part] * shrink[:, None]
            sums = sums + (tl.dot(weights.to(operand), value, scaled, input_precision="ieee"),)
        acc = sums

    out_row = token.to(tl.int64) * HEADS + head
    is_written = is_query
    norm = 1 / tl.maximum(total, 1e-30)  # total is 0, as acc, or at least 1
    if lse is not None:
        out_row += split.to(tl.int64) * num_tokens * HEADS
        tl.store(lse + out_row, largest + tl.log2(total), mask=is_query)
        is_written = is_query & (total > 0)
    for part in tl.static_range(len(PARTS)):
        output = o + out_row[:, None] * K + PARTS[part][0] + tl.arange(0, PARTS[part][1])
        tl.store(output, (acc[part] * norm[:, None]).to(o.dtype.element_ty), mask=is_written[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(split_o, lse, o, num_splits, SPLITS: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    """Join one query's results ``split_o [splits, T, H, K]``, ``lse [splits, T, H]`` into ``o [T, H, K]``."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    place = tl.arange(0, SPLITS).to(tl.int64) * num_rows + row
    sum_log = tl.load(lse + place, mask=tl.arange(0, SPLITS) < num_splits, other=float("-inf"))
    largest = tl.maximum(tl.max(sum_log, axis=0), -1e30)  # finite: -inf minus -inf would be NaN
    weights = tl.exp2(sum_log - largest)
    weights /= tl.maximum(tl.sum(weights, axis=0), 1e-30)  # the sum is 0, as every weight, or at least 1
    for part in tl.static_range(len(PARTS)):
        column = PARTS[part][0] + tl.arange(0, PARTS[part][1])
        x = tl.load(split_o + place[:, None] * K + column, mask=weights[:, None] > 0, other=0.0)
        x = tl.sum(x * weights[:, None], axis=0)
        tl.store(o + row.to(tl.int64) * K + column, x.to(o.dtype.element_ty))


@triton.jit(do_not_specialize=["num_tokens", "block_size"])
def _store_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    k_stride,
    v_stride,
    k_cache_stride,
    v_cache_stride,
    num_tokens,
    block_size,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy some rows (token, KV head) of k and v to their slots."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    used = (slot >= 0)[:, None]
    block, place = slot // block_size, slot % block_size
    k_row = k + token * k_stride[0] + head * k_stride[1]
    v_row = v + token * v_stride[0] + head * v_stride[1]
    k_slot = k_cache + block * k_cache_stride[0] + place * k_cache_stride[1] + head * k_cache_stride[2]
    v_slot = v_cache + block * v_cache_stride[0] + place * v_cache_stride[1] + head * v_cache_stride[2]
    for part in tl.static_range(len(PARTS)):
        column = PARTS[part][0] + tl.arange(0, PARTS[part][1])
        x = tl.load(k_row[:, None] + column * k_stride[2], mask=used)
        y = tl.load(v_row[:, None] + column * v_stride[2], mask=used)
        tl.store(k_slot[:, None] + column * k_cache_stride[3], x.to(k_cache.dtype.element_ty), mask=used)
        tl.store(v_slot[:, None] + column * v_cache_stride[3], y.to(v_cache.dtype.element_ty), mask=used)
