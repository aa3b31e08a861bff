"""The RWKV-7 step that reads and writes each state once: one to a few tokens a sequence, in Triton.

``wkv7_decode`` is the recurrence alone, ``mixer_decode`` the whole mixer between its projections in the same
launch. A program owns ``block_v`` value columns of one head's state, which never leave its registers between
the read and the write, so a second token costs no traffic; columns are independent, so the split needs no
exchange, only a repetition of the work on key vectors. K is walked in tiles of 32 rows, so that K = 96 leaves
no lane idle. The grid depends on shapes alone: a captured CUDA graph stays valid for any slots and lengths.

It has no backward and no checks of its arguments beyond asserts: ``hrwkv.kernels.wkv7`` holds those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrwkv.kernels.mix.naive import LOW_RANK_VALUE_SCALE, FirstLayer, Form, Rope, Rows, Weights


class Launch(NamedTuple):
    """How a launch is cut: value columns a program, rows of a key tile, warps a program.

    ``load_first``: the state's loads are issued before all other work, by one warp.
    """

    block_v: int
    block_k: int
    num_warps: int
    load_first: bool = False


class _Inputs(NamedTuple):
    """What the recurrence takes for its tokens."""

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def choose_launch(
    num_pairs: int, *, key_size: int, value_size: int, num_warps: int, state_dtype: torch.dtype
) -> Launch:
    """The cut for ``num_pairs`` = N * H pairs of sequence and head; measured in benchmarks/results.

    32 columns are one 128-byte line of an fp32 state, 16 bytes a thread. For two warps, up to 256 pairs would
    leave half of a large device's multiprocessors idle: 16 columns then give twice the programs of half the
    length. One warp is the fused step, and twice the programs would repeat its work on key vectors. K = 128
    takes 16 as well: 32 columns would be 128 registers of state a thread, beside its vectors too many.

    Many bf16 states wait for the memory's way with half lines, not for when their loads begin.
    """
    columns = 16 if (num_pairs <= 256 and num_warps > 1) or key_size > 96 else 32
    return Launch(
        block_v=min(columns, _power_of_two(value_size)),
        block_k=min(32, _power_of_two(key_size)),
        num_warps=num_warps,
        load_first=num_warps == 1 and (state_dtype == torch.float32 or num_pairs <= 512),
    )


def _power_of_two(size: int) -> int:
    """The largest power of two that divides ``size``."""
    return size & -size


def wkv7_decode(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor,
    state_slots: Tensor,
    cu_seqlens: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Advance N sequences and update their states in place, hxa079.md (11).

    r, log_decay, k, b: [T, H, K] any float dtype, each head contiguous. v: [T, H_v, V] and a: [T, H_kv, K],
    where query head h reads head ``h // (H / H_v)``. state: pool [slots, H, K, V] fp32 or bf16; the
    arithmetic is fp32. state_slots: [N] int32 or int64, all different; a negative one is padding: no state is
    touched and its outputs are zeros. cu_seqlens: [N + 1] int32 or int64, None for one token a sequence;
    empty sequences are allowed, rows that no sequence owns are not written. Returns o [T, H, V] in v's dtype.
    """
    num_tokens, heads, key_size = r.shape
    value_size = v.shape[-1]
    inputs = _Inputs._make(map(_by_heads, (r, log_decay, k, v, a, b)))
    o = v.new_empty(num_tokens, heads, value_size)
    if launch is None:  # two warps: more loads in flight than one, and little work to repeat
        launch = choose_launch(
            len(state_slots) * heads,
            key_size=key_size,
            value_size=value_size,
            num_warps=2,
            state_dtype=state.dtype,
        )
    _check_state(state, shape=(heads, key_size, value_size), launch=launch)
    _wkv7_kernel[_grid(state_slots, state, launch)](
        o,
        inputs,
        _Inputs._make(x.stride(0) for x in inputs),
        state,
        state.stride(0),
        state_slots,
        cu_seqlens,
        H=heads,
        VALUE_HEADS=v.shape[1],
        KEY_HEADS=a.shape[1],
        K=key_size,
        V=value_size,
        BK=launch.block_k,
        BV=launch.block_v,
        LOAD_FIRST=launch.load_first,
        num_warps=launch.num_warps,
    )
    return o


def mixer_decode(
    rows: Rows,
    weights: Weights,
    *,
    form: Form,
    rope: Rope | None,
    first: FirstLayer | None,
    state: Tensor,
    state_slots: Tensor,
    cu_seqlens: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, FirstLayer | None]:
    """Everything of the mixer between its projections and W_o, hxa079.md (3) to (14) and (31) to (33).

    rows, weights, form, rope, first: as ``hrwkv.kernels.mix.mix`` takes them, each head contiguous; a first
    layer (first=None) whose form reads layer 0 returns its own value and key. state, state_slots,
    cu_seqlens: as for ``wkv7_decode``. Returns y [T, H, K] in the rows' dtype, and ``first``. Intermediate
    results stay fp32, so nothing between the rows and y is rounded.
    """
    num_tokens, heads, size = rows.r.shape
    num_kv_heads = rows.k.shape[1]
    rows = Rows._make(None if x is None else _by_heads(x) for x in rows)
    gates_value = form.value_residual in ("gated", "gated_repeated")
    reads_layer_0 = gates_value or weights.k0 is not None
    is_first = first is None
    if is_first and reads_layer_0:
        value_heads = num_kv_heads if form.value_residual in ("gated", "none") else heads
        first = rows.v.new_empty(num_tokens, value_heads, size), rows.k.new_empty(rows.k.shape)
    assert form.value_residual != "low_rank" or rows.value is not None
    assert is_first or not gates_value or (rows.value is not None and weights.v0 is not None)
    assert is_first or weights.k0 is None or rows.key is not None
    assert first is None or all(x.is_contiguous() for x in first)
    y = rows.r.new_empty(num_tokens, heads, size)
    if launch is None:  # one warp does the work on key vectors once, several would each repeat it
        launch = choose_launch(
            len(state_slots) * heads,
            key_size=size,
            value_size=size,
            num_warps=1,
            state_dtype=state.dtype,
        )
    _check_state(state, shape=(heads, size, size), launch=launch)
    _mixer_kernel[_grid(state_slots, state, launch)](
        y,
        rows,
        Rows._make(None if x is None else x.stride(0) for x in rows),
        weights,
        rope,
        first if reads_layer_0 else None,
        state,
        state.stride(0),
        state_slots,
        cu_seqlens,
        form.norm_eps,
        H=heads,
        KV_HEADS=num_kv_heads,
        K=size,
        VALUE_RESIDUAL=form.value_residual,
        LOW_RANK_SCALE=LOW_RANK_VALUE_SCALE,
        LOG_LOG_KEY=form.key_scale == "log_log",
        IS_FIRST=is_first,
        BK=launch.block_k,
        BV=launch.block_v,
        LOAD_FIRST=launch.load_first,
        num_warps=launch.num_warps,
    )
    return y, first


def _by_heads(x: Tensor) -> Tensor:
    """x [T, heads, size], each token contiguous; tokens may lie apart, as in a view of a wider product."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _check_state(state: Tensor, *, shape: tuple[int, int, int], launch: Launch) -> None:
    assert state.dtype != torch.float64, "the arithmetic is fp32"
    assert state.shape[1:] == shape, (state.shape, shape)
    assert state[0].is_contiguous(), "the heads of a slot must lie side by side"
    assert shape[1] % launch.block_k == 0, launch
    assert shape[2] % launch.block_v == 0, launch


def _grid(state_slots: Tensor, state: Tensor, launch: Launch) -> tuple[int]:
    return (len(state_slots) * state.shape[1] * (state.shape[3] // launch.block_v),)


@triton.jit
def _wkv7_kernel(
    o,
    inputs,
    strides,
    state,
    state_stride,
    state_slots,
    cu_seqlens,
    H: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LOAD_FIRST: tl.constexpr,
):
    h, columns, begin, length, pointers, alive = _locate(
        state, state_stride, state_slots, cu_seqlens, H, K, V, BK, BV
    )
    tiles = _load_state(pointers, alive, K, V, BK, LOAD_FIRST)
    value_head, key_head = h // (H // VALUE_HEADS), h // (H // KEY_HEADS)
    for step in range(length):
        token = (begin + step).to(tl.int64)
        r = _load_row(inputs.r + token * strides.r + h * K, K, BK)
        log_decay = _load_row(inputs.log_decay + token * strides.log_decay + h * K, K, BK)
        k = _load_row(inputs.k + token * strides.k + h * K, K, BK)
        a = _load_row(inputs.a + token * strides.a + key_head * K, K, BK)
        b = _load_row(inputs.b + token * strides.b + h * K, K, BK)
        v = tl.load(inputs.v + token * strides.v + value_head * V + columns).to(tl.float32)
        decay = ()
        for i in tl.static_range(len(log_decay)):
            decay = decay + (tl.exp(log_decay[i]),)
        tiles, out = _advance(tiles, r, decay, k, v, a, b)
        out = tl.where(alive, out, 0.0)
        tl.store(o + (token * H + h) * V + columns, out.to(o.dtype.element_ty))
    _store_state(pointers, tiles, alive, V, BK)


@triton.jit
def _mixer_kernel(
    y,
    rows,
    strides,
    weights,
    rope,
    first,
    state,
    state_stride,
    state_slots,
    cu_seqlens,
    eps,
    H: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K: tl.constexpr,
    VALUE_RESIDUAL: tl.constexpr,
    LOW_RANK_SCALE: tl.constexpr,
    LOG_LOG_KEY: tl.constexpr,
    IS_FIRST: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LOAD_FIRST: tl.constexpr,
):
    h, columns, begin, length, pointers, alive = _locate(
        state, state_stride, state_slots, cu_seqlens, H, K, K, BK, BV
    )
    tiles = _load_state(pointers, alive, K, K, BK, LOAD_FIRST)
    GROUP: tl.constexpr = H // KV_HEADS
    kv_head = h // GROUP
    GATES_VALUE: tl.constexpr = VALUE_RESIDUAL == "gated" or VALUE_RESIDUAL == "gated_repeated"
    # The heads that share a row of v_first and of v0.
    VALUE_GROUP: tl.constexpr = GROUP if VALUE_RESIDUAL == "gated" or VALUE_RESIDUAL == "none" else 1
    value_head = h // VALUE_GROUP
    for step in range(length):
        token = (begin + step).to(tl.int64)
        r = _load_rotated(rows.r + token * strides.r + h * K, weights.r_norm, rope, token, eps, K, BK)
        k = _load_rotated(rows.k + token * strides.k + kv_head * K, weights.k_norm, rope, token, eps, K, BK)
        v = tl.load(rows.v + token * strides.v + kv_head * K + columns).to(tl.float32)
        if VALUE_RESIDUAL == "low_rank":
            value = tl.load(rows.value + token * strides.value + h * K + columns).to(tl.float32)
            v += LOW_RANK_SCALE * value  # (32)
        if first is not None:
            v_first = first[0] + (token * (H // VALUE_GROUP) + value_head) * K + columns
            k_first = first[1] + (token * KV_HEADS + kv_head) * K
            if IS_FIRST:  # heads of a group and blocks of a head hold the same: one of them writes
                tl.store(v_first, v.to(v_first.dtype.element_ty), mask=h % VALUE_GROUP == 0)
                _store_row(k_first, k, (h % GROUP == 0) & (tl.program_id(0) % (K // BV) == 0))
            else:
                if GATES_VALUE:  # (5, 31)
                    value = tl.load(rows.value + token * strides.value + value_head * K + columns)
                    bias = tl.load(weights.v0 + value_head * K + columns).to(tl.float32)
                    gate = tl.sigmoid(bias + value.to(tl.float32))
                    v += (tl.load(v_first).to(tl.float32) - v) * gate
                if weights.k0 is not None:  # (6)
                    logits = _load_biased(rows.key + token * strides.key, weights.k0, kv_head * K, K, BK)
                    k = _blend(k, _load_row(k_first, K, BK), logits)
        iclr = _load_biased(rows.iclr + token * strides.iclr, weights.a0, h * K, K, BK)
        decay_input = _load_biased(rows.decay + token * strides.decay, weights.w0, h * K, K, BK)
        inverse_norm = 1 / tl.maximum(tl.sqrt(_dot(k, k)), 1e-12)  # (9)
        decay, scaled_k, a, b = (), (), (), ()
        for i in tl.static_range(len(k)):
            rate = tl.sigmoid(iclr[i])  # (7)
            kk = k[i] * inverse_norm
            # log(sigmoid) = -softplus(-x), in the form that cannot overflow; (8)
            log_sigmoid = tl.minimum(decay_input[i], 0.0) - tl.log(1 + tl.exp(-tl.abs(decay_input[i])))
            w = log_sigmoid - 0.5
            decay_i = tl.exp(-tl.exp(w))
            scale = w if LOG_LOG_KEY else decay_i
            decay = decay + (decay_i,)
            scaled_k = scaled_k + (k[i] * (1 - scale + rate),)  # (10, 33)
            a = a + (-kk,)
            b = b + (kk * rate,)
        tiles, out = _advance(tiles, r, decay, scaled_k, v, a, b)
        out *= K**-0.5  # (12)
        if weights.r_k is not None:
            out += _dot(_multiply(r, scaled_k), _load_row(weights.r_k + h * K, K, BK)) * v  # (13)
        gate = tl.load(rows.gate + token * strides.gate + h * K + columns).to(tl.float32)
        out = tl.where(alive, out * gate, 0.0)  # (14)
        tl.store(y + (token * H + h) * K + columns, out.to(y.dtype.element_ty))
    _store_state(pointers, tiles, alive, K, BK)


@triton.jit
def _locate(
    state,
    state_stride,
    state_slots,
    cu_seqlens,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """This program's head, its value columns [BV], first token and number of tokens; where its state lies.

    The last two are pointers to the first tile of rows [BK, BV], and whether they may be followed.
    """
    program = tl.program_id(0)
    columns = program % (V // BV) * BV + tl.arange(0, BV)
    n, h = program // (V // BV) // H, program // (V // BV) % H
    slot = tl.load(state_slots + n).to(tl.int64)
    alive = slot >= 0
    if cu_seqlens is None:
        begin, length = n, 1
    else:
        begin = tl.load(cu_seqlens + n)
        length = tl.load(cu_seqlens + n + 1) - begin
        alive = alive & (length > 0)
    row = h * K + tl.arange(0, BK)
    pointers = state + slot * state_stride + row[:, None] * V + columns[None, :]
    return h, columns, begin, length, pointers, alive


@triton.jit
def _load_state(
    pointers, alive, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, LOAD_FIRST: tl.constexpr
):
    """A tuple of K / BK tiles [BK, BV] fp32, zeros for padding."""
    tiles = ()
    for i in tl.static_range(K // BK):
        tile = tl.load(pointers + i * BK * V, mask=alive, other=0.0)
        tiles = tiles + (tile if LOAD_FIRST else tile.to(tl.float32),)
    if LOAD_FIRST:
        # No load passes a barrier; else the compiler puts these behind the work on vectors.
        tl.debug_barrier()
        wide = ()
        for i in tl.static_range(len(tiles)):
            wide = wide + (tiles[i].to(tl.float32),)
        tiles = wide
    return tiles


@triton.jit
def _store_state(pointers, tiles, alive, V: tl.constexpr, BK: tl.constexpr):
    for i in tl.static_range(len(tiles)):
        tl.store(pointers + i * BK * V, tiles[i].to(pointers.dtype.element_ty), mask=alive)


@triton.jit
def _advance(tiles, r, decay, k, v, a, b):
    """One token (11): the new state's tiles and its output S^T r [BV].

    r, decay, k, a, b are tuples of [BK] tiles, v is [BV]. With u = a^T S, the output
    r^T (decay S + b u + k v) is (r decay)^T S + (r b) u + (r k) v, so both products with the old state are
    summed in one exchange between threads, before the update.
    """
    # These wait for no state, so they come before the first use of it.
    r_b, r_k = _dot(r, b), _dot(r, k)
    decayed_r = _multiply(r, decay)
    removed, kept = a[0][:, None] * tiles[0], decayed_r[0][:, None] * tiles[0]
    for i in tl.static_range(1, len(tiles)):
        removed += a[i][:, None] * tiles[i]
        kept += decayed_r[i][:, None] * tiles[i]
    u, out = tl.split(tl.sum(tl.join(removed, kept), axis=0))
    advanced = ()
    for i in tl.static_range(len(tiles)):
        update = b[i][:, None] * u[None, :] + k[i][:, None] * v[None, :]
        advanced = advanced + (decay[i][:, None] * tiles[i] + update,)
    return advanced, out + r_b * u + r_k * v


@triton.jit
def _load_row(row, K: tl.constexpr, BK: tl.constexpr):
    """The K elements at ``row`` as a tuple of [BK] tiles in fp32."""
    tiles = ()
    for i in tl.static_range(K // BK):
        tiles = tiles + (tl.load(row + i * BK + tl.arange(0, BK)).to(tl.float32),)
    return tiles


@triton.jit
def _load_rotated(row, norm, rope, token, eps, K: tl.constexpr, BK: tl.constexpr):
    """The K elements at ``row``, normed with the weights at ``norm`` (3) and rotated (4), where there are."""
    x = _load_row(row, K, BK)
    scale = 1.0
    if norm is not None:
        scale = tl.rsqrt(_dot(x, x) / K + eps)
        x = _multiply(x, _load_row(norm, K, BK))
    tiles = ()
    for i in tl.static_range(len(x)):
        rotated = x[i] * scale
        if rope is not None:
            # A pair's other half may lie in another tile, so it is loaded anew: the line is in the cache.
            channel = i * BK + tl.arange(0, BK)
            other = (channel + K // 2) % K
            pair = tl.load(row + other).to(tl.float32) * scale
            if norm is not None:
                pair *= tl.load(norm + other).to(tl.float32)
            angle = token * (K // 2) + channel % (K // 2)
            sin = tl.load(rope[1] + angle)
            rotated = rotated * tl.load(rope[0] + angle) + tl.where(channel < K // 2, -pair, pair) * sin
        tiles = tiles + (rotated,)
    return tiles


@triton.jit
def _load_biased(row, bias, at, K: tl.constexpr, BK: tl.constexpr):
    """The K elements at offset ``at`` of a token's row and of a weight vector, added; a tuple of tiles."""
    x, y = _load_row(row + at, K, BK), _load_row(bias + at, K, BK)
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles = tiles + (x[i] + y[i],)
    return tiles


@triton.jit
def _store_row(row, tiles, mask):
    BK: tl.constexpr = tiles[0].shape[0]
    for i in tl.static_range(len(tiles)):
        tl.store(row + i * BK + tl.arange(0, BK), tiles[i].to(row.dtype.element_ty), mask=mask)


@triton.jit
def _blend(own, first, logits):
    """own moved towards ``first`` by sigmoid(logits), all tuples of tiles."""
    tiles = ()
    for i in tl.static_range(len(own)):
        tiles = tiles + (own[i] + (first[i] - own[i]) * tl.sigmoid(logits[i]),)
    return tiles


@triton.jit
def _multiply(x, y):
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles = tiles + (x[i] * y[i],)
    return tiles


@triton.jit
def _dot(x, y):
    """The sum of products of two tuples of tiles, a scalar."""
    products = x[0] * y[0]
    for i in tl.static_range(1, len(x)):
        products += x[i] * y[i]
    return tl.sum(products)
