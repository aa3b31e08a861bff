"""Triton kernel of the mixer's work by elements for the chunked recurrence: from rows to scaled rows.

``mix`` and the first half of ``prepare`` in one pass: the rows of a chunk are normed, rotated and mixed, and
leave as r^, k^, a^ and b^ of hxa079.md (18), so neither the vectors of single tokens nor their decays reach
memory. Only where no gradient is asked for: a backward needs the unscaled vectors.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hrwkv.kernels.mix.tiles import (
    LOG2_E,
    load,
    load_angles,
    load_key,
    load_normed,
    offset,
    rates,
    residual,
    rotate,
    scaled,
    store,
    store_head,
    sum_row,
)


class Hats(NamedTuple):
    """r^, k^, a^ and b^ of (18), [NT, H, C, K], zeros past a chunk's tokens."""

    r: Tensor
    k: Tensor
    a: Tensor
    b: Tensor


@triton.jit
def scale_rows(
    rows,
    weights,
    rope,
    first,
    chunks,
    hats,
    v_out,
    k_first,
    ending,
    own,
    bonus,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    LOG_LOG: tl.constexpr,
    REPEATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (KV head, chunk).

    rows, weights, rope, first: as for ``hrwkv.kernels.mix.fused_mix``, and so are v_out (None: the rows' own)
    and k_first [T, H_kv, K] (the first layer's). hats: the pointers of ``Hats``. ending [NT, H, K] fp32, the
    decay of a whole chunk; own [NT, H, C] fp32, r k of each token; bonus [T, H] fp32 or None.
    """
    chunk = (tl.program_id(0) // H_KV).to(tl.int64)
    kv_head = tl.program_id(0) % H_KV
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    step = tl.arange(0, C)
    token = step[:, None]
    present = step < tl.load(chunks + 2 * chunk + 1)
    column = tl.broadcast_to(tl.arange(0, W)[None, :], (C, W))
    inside = column < K // 2
    live = inside & present[:, None]
    kv = (start * H_KV + kv_head) * K + token * (H_KV * K) + column
    kv_vector = kv_head * K + column
    angles = load_angles(rope, start, token, column, live, K, W)
    k = load_key(rows, weights, angles, first, kv, live, kv_vector, column, eps, K, W)
    if k_first is not None:
        store_head(k_first, kv, k, live, K, W)
    kk = scaled(k, 1.0 / tl.maximum(tl.sqrt(sum_row(k, k)), 1e-12))  # (9)
    if v_out is not None and not REPEATED:
        for i in tl.static_range(len(k)):
            at, n = kv + offset(i, K, W), kv_vector + offset(i, K, W)
            v = residual(load(rows.v, at, live), at, live, rows.value, weights.v0, n, first[0])
            store(v_out, at, v, live)
    for group in tl.range(0, H // H_KV, num_stages=STAGES):
        head = kv_head * (H // H_KV) + group
        q = (start * H + head) * K + token * (H * K) + column
        vector = head * K + column
        place = chunk * H + head
        hat = place * (C * K) + token * K + column
        r = load_normed(rows.r, q, live, weights.r_norm, column, eps, K, W)
        if rope is not None:
            r = rotate(r, angles, 1)
        alone = tl.zeros((C, W), tl.float32)
        weighted = tl.zeros((C, W), tl.float32)
        for i in tl.static_range(len(k)):
            at, n, to = q + offset(i, K, W), vector + offset(i, K, W), hat + offset(i, K, W)
            decay = load(rows.decay, at, live) + load(weights.w0, n, live)
            iclr = load(rows.iclr, at, live) + load(weights.a0, n, live)
            iclr, log_decay, factor, _ = rates(decay, iclr, LOG_LOG)
            log_decay = tl.where(live, log_decay * LOG2_E, 0.0)
            total = tl.cumsum(log_decay, 0)
            grow, shrink = tl.exp2(total), tl.exp2(-total)
            key = k[i] * factor
            store(hats.r, to, r[i] * grow, inside)
            store(hats.k, to, key * shrink, inside)
            store(hats.a, to, -kk[i] * tl.exp2(total - log_decay), inside)
            store(hats.b, to, kk[i] * iclr * shrink, inside)
            store(ending, place * K + offset(i, K, W) + column, grow, inside & (token == C - 1))
            rk = r[i] * key
            alone += rk
            if bonus is not None:
                weighted += rk * load(weights.r_k, n, live)
            if v_out is not None and REPEATED:
                v = load(rows.v, kv + offset(i, K, W), live)
                v = residual(v, at, live, rows.value, weights.v0, n, first[0])
                store(v_out, at, v, live)
        tl.store(own + place * C + step, tl.sum(alone, 1))
        if bonus is not None:
            tl.store(bonus + (start + step) * H + head, tl.sum(weighted, 1), mask=present)
