"""``mix`` in Triton: one launch forward and one backward; only what came in is kept between them.

One program handles a block of tokens of one KV head and walks the query heads that share it, so k, kk and the
key's gradient are computed once for the group and never repeated in memory; the next head's rows are on their
way while one is worked on. The gradients of the small vectors are summed over a block of tokens in the
program and over the blocks by torch, without atomics: the same inputs give the same bits. These sums are what
holds the backward up: they are exchanges between threads, so its programs have one warp each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrwkv.kernels.mix.naive import FirstLayer, Form, Mixed, Rope, Rows, Weights, repeat_heads
from hrwkv.kernels.mix.tiles import (
    LOG2_E,
    add,
    load,
    load_angles,
    load_head,
    load_key,
    load_normed,
    load_own_key,
    locate,
    norm_backward,
    offset,
    rates,
    residual,
    residual_backward,
    rotate,
    scaled,
    store,
    store_head,
    store_sum,
    store_sums,
    sum_row,
)


class Launch(NamedTuple):
    """How a kernel is cut: elements of a tile, the most columns that one may have, warps of a program."""

    size: int
    width: int
    num_warps: int


FORWARD = Launch(size=256, width=64, num_warps=2)
BACKWARD = Launch(size=256, width=64, num_warps=1)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    rows,
    weights,
    rope,
    first,
    mixed,
    bonus,
    k_first,
    T,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    K: tl.constexpr,
    LOG_LOG: tl.constexpr,
    REPEATED: tl.constexpr,
    BT: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write ``mixed``, bonus [T, H] fp32 if there is one and, in the first layer, its key before (10).

    rows, weights, mixed: the tuples of ``naive``, of pointers; mixed.r and mixed.v are None where they are
    the rows themselves. rope and first: two pointers, or two None. REPEATED: the value residual is on the
    query heads.
    """
    TILES: tl.constexpr = 2 * ((K // 2 + W - 1) // W)
    kv_head, start, token, column, live = locate(T, H_KV, K, BT, W)
    kv = (start * H_KV + kv_head) * K + token * (H_KV * K) + column
    kv_vector = kv_head * K + column
    angles = load_angles(rope, start, token, column, live, K, W)
    k = load_key(rows, weights, angles, first, kv, live, kv_vector, column, eps, K, W)
    if k_first is not None:
        store_head(k_first, kv, k, live, K, W)
    scale = 1.0 / tl.maximum(tl.sqrt(sum_row(k, k)), 1e-12)  # kk = k * scale (9)
    store_head(mixed.a, kv, scaled(k, -scale), live, K, W)
    if mixed.v is not None and not REPEATED:
        for i in tl.static_range(TILES):
            at, n = kv + offset(i, K, W), kv_vector + offset(i, K, W)
            v = residual(load(rows.v, at, live), at, live, rows.value, weights.v0, n, first[0])
            store(mixed.v, at, v, live)
    for group in tl.range(0, H // H_KV, num_stages=STAGES):
        head = kv_head * (H // H_KV) + group
        q = (start * H + head) * K + token * (H * K) + column
        vector = head * K + column
        if mixed.r is not None or bonus is not None:
            r = load_normed(rows.r, q, live, weights.r_norm, column, eps, K, W)
            if rope is not None:
                r = rotate(r, angles, 1)
            if mixed.r is not None:
                store_head(mixed.r, q, r, live, K, W)
        total = tl.zeros((BT, W), tl.float32)
        for i in tl.static_range(TILES):
            at, n = q + offset(i, K, W), vector + offset(i, K, W)
            decay = load(rows.decay, at, live) + load(weights.w0, n, live)
            iclr = load(rows.iclr, at, live) + load(weights.a0, n, live)
            iclr, log_decay, factor, _ = rates(decay, iclr, LOG_LOG)
            key = k[i] * factor
            store(mixed.log_decay, at, log_decay, live)
            store(mixed.k, at, key, live)
            store(mixed.b, at, k[i] * (scale * iclr), live)
            if bonus is not None:
                total += r[i] * key * load(weights.r_k, n, live)
            if mixed.v is not None and REPEATED:
                v = load(rows.v, kv + offset(i, K, W), live)
                v = residual(v, at, live, rows.value, weights.v0, n, first[0])
                store(mixed.v, at, v, live)
        if bonus is not None:
            row = start + tl.arange(0, BT)
            tl.store(bonus + row * H + head, tl.sum(total, 1), mask=row < T)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    rows,
    weights,
    rope,
    first,
    dmixed,
    dbonus,
    dk_first,
    drows,
    dweights,
    dfirst,
    T,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    K: tl.constexpr,
    LOG_LOG: tl.constexpr,
    REPEATED: tl.constexpr,
    BT: tl.constexpr,
    W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """From dmixed, dbonus and dk_first the gradients of everything that came in.

    dweights: partial sums, [blocks, heads, K] and, for the norms, [blocks, H_kv, K] fp32. dfirst: two
    pointers, or two None where no gradient of layer 0 is asked for.
    """
    block = tl.program_id(0) // H_KV
    TILES: tl.constexpr = 2 * ((K // 2 + W - 1) // W)
    kv_head, start, token, column, live = locate(T, H_KV, K, BT, W)
    kv = (start * H_KV + kv_head) * K + token * (H_KV * K) + column
    kv_vector = kv_head * K + column
    kv_sum = (block * H_KV + kv_head) * K
    angles = load_angles(rope, start, token, column, live, K, W)
    k = load_key(rows, weights, angles, first, kv, live, kv_vector, column, eps, K, W)
    norm = tl.sqrt(sum_row(k, k))
    scale = 1.0 / tl.maximum(norm, 1e-12)  # kk = k * scale (9)
    # With dkk, the gradient of kk: dk + scale dkk and k dkk, which is all that (9) needs of it.
    da = load_head(dmixed.a, kv, live, K, W)
    dk = scaled(da, -scale)
    k_dkk = -sum_row(k, da)
    dv = scaled(k, 0.0)
    dr_norm = dv
    if dmixed.v is not None and not REPEATED:
        for i in tl.static_range(TILES):
            at, n = kv + offset(i, K, W), kv_vector + offset(i, K, W)
            dy, own = load(dmixed.v, at, live), load(rows.v, at, live)
            down, dv0 = residual_backward(
                dy, own, at, live, rows.value, weights.v0, n, first[0], drows.value, dfirst[0]
            )
            store(drows.v, at, down, live)
            store_sum(dweights.v0, kv_sum + offset(i, K, W), dv0, K, W)
    for group in tl.range(0, H // H_KV, num_stages=STAGES):
        head = kv_head * (H // H_KV) + group
        q = (start * H + head) * K + token * (H * K) + column
        vector = head * K + column
        q_sum = (block * H + head) * K
        if dbonus is not None:
            upstream = load(dbonus, (start + token) * H + head, start + token < T)
            r = load_normed(rows.r, q, live, weights.r_norm, column, eps, K, W)
            if rope is not None:
                r = rotate(r, angles, 1)
        dr = ()
        dk_after = ()
        dv_after = ()
        along = tl.zeros((BT, W), tl.float32)
        for i in tl.static_range(TILES):
            at, n = q + offset(i, K, W), vector + offset(i, K, W)
            partial = q_sum + offset(i, K, W)
            decay = load(rows.decay, at, live) + load(weights.w0, n, live)
            iclr = load(rows.iclr, at, live) + load(weights.a0, n, live)
            iclr, log_decay, factor, slope = rates(decay, iclr, LOG_LOG)
            dscaled, db = load(dmixed.k, at, live), load(dmixed.b, at, live)
            if drows.r is not None:
                dr_tile = tl.zeros((BT, W), tl.float32)
                if dmixed.r is not None:
                    dr_tile = load(dmixed.r, at, live)
                if dbonus is not None:
                    weight = load(weights.r_k, n, live)
                    key = upstream * k[i] * factor
                    dr_tile += key * weight
                    dscaled += upstream * r[i] * weight
                    store_sum(dweights.r_k, partial, r[i] * key, K, W)
                dr = dr + (dr_tile,)
            dkk = db * iclr
            dk_after = dk_after + (dk[i] + dscaled * factor + dkk * scale,)
            along += k[i] * dkk
            dw = load(dmixed.log_decay, at, live) * log_decay
            if LOG_LOG:
                dw -= dscaled * k[i]
            else:
                dw -= dscaled * k[i] * tl.exp2(log_decay * LOG2_E) * log_decay
            ddecay = dw * slope
            diclr = k[i] * (dscaled + db * scale) * iclr * (1.0 - iclr)
            store(drows.decay, at, ddecay, live)
            store(drows.iclr, at, diclr, live)
            store_sums(dweights.w0, dweights.a0, partial, ddecay, diclr, K, W)
            if dmixed.v is not None and REPEATED:
                dy, own = load(dmixed.v, at, live), load(rows.v, kv + offset(i, K, W), live)
                down, dv0 = residual_backward(
                    dy, own, at, live, rows.value, weights.v0, n, first[0], drows.value, dfirst[0]
                )
                dv_after = dv_after + (dv[i] + down,)
                if weights.v0 is not None:
                    store_sum(dweights.v0, partial, dv0, K, W)
        dk = dk_after
        k_dkk += tl.sum(along, 1)[:, None]
        if dmixed.v is not None and REPEATED:
            dv = dv_after
        if drows.r is not None:
            if rope is not None:
                dr = rotate(dr, angles, -1)
            if weights.r_norm is not None:
                dr, dweight = norm_backward(dr, rows.r, q, live, weights.r_norm, column, eps, K, W)
                dr_norm = add(dr_norm, dweight)
            store_head(drows.r, q, dr, live, K, W)
    along = tl.where(norm > 1e-12, scale * scale * scale * k_dkk, 0.0)
    dk = add(dk, scaled(k, -along))
    if dk_first is not None:
        dk = add(dk, load_head(dk_first, kv, live, K, W))
    if rows.key is not None:
        own = load_own_key(rows, weights, angles, kv, live, column, eps, K, W)
        down = ()
        for i in tl.static_range(TILES):
            at, n = kv + offset(i, K, W), kv_vector + offset(i, K, W)
            dx, dk0 = residual_backward(
                dk[i], own[i], at, live, rows.key, weights.k0, n, first[1], drows.key, dfirst[1]
            )
            down = down + (dx,)
            store_sum(dweights.k0, kv_sum + offset(i, K, W), dk0, K, W)
        dk = down
    if rope is not None:
        dk = rotate(dk, angles, -1)
    if weights.k_norm is not None:
        dk, dk_norm = norm_backward(dk, rows.k, kv, live, weights.k_norm, column, eps, K, W)
        for i in tl.static_range(TILES):
            store_sum(dweights.k_norm, kv_sum + offset(i, K, W), dk_norm[i], K, W)
            store_sum(dweights.r_norm, kv_sum + offset(i, K, W), dr_norm[i], K, W)
    store_head(drows.k, kv, dk, live, K, W)
    if dmixed.v is not None and REPEATED:
        store_head(drows.v, kv, dv, live, K, W)


def mix(
    rows: Rows, weights: Weights, *, form: Form, rope: Rope | None, first: FirstLayer | None
) -> tuple[Mixed, Tensor | None, FirstLayer | None]:
    """The contract is ``hrwkv.kernels.mix.mix``'s; fp32 inside."""
    rows_read, weights_read, first_read, starts = select(rows, weights, form=form, rope=rope, first=first)
    r, log_decay, k, v, a, b, bonus, own_key = _Mix.apply(
        form, rope, starts, *rows_read, *weights_read, *first_read
    )
    v = own_value(rows, form) if v is None else v
    mixed = Mixed(r=rows.r if r is None else r, log_decay=log_decay, k=k, v=v, a=a, b=b)
    return mixed, bonus, (v, own_key) if starts else first


def select(
    rows: Rows, weights: Weights, *, form: Form, rope: Rope | None, first: FirstLayer | None
) -> tuple[Rows, Weights, tuple[Any, Any], bool]:
    """What the kernels read, None for the rest, and whether this is a first layer whose key others read.

    rows.r is read where it turns or is in a bonus; what reads no row leaves the row as it is.
    """
    gates_value = form.value_residual in ("gated", "gated_repeated")
    starts = first is None and (gates_value or weights.k0 is not None)
    reads_value = form.value_residual == "low_rank" or (gates_value and not starts)
    reads_key = weights.k0 is not None and not starts
    turns = rope is not None or weights.r_norm is not None
    v_first, k_first = (None, None) if first is None else first
    rows = rows._replace(
        r=_kept(rows.r, turns or weights.r_k is not None),
        gate=_kept(rows.gate, False),
        value=_kept(rows.value, reads_value),
        key=_kept(rows.key, reads_key),
    )
    weights = weights._replace(
        v0=_kept(weights.v0, reads_value and gates_value), k0=_kept(weights.k0, reads_key)
    )
    return rows, weights, (_kept(v_first, reads_value and gates_value), _kept(k_first, reads_key)), starts


def own_value(rows: Rows, form: Form) -> Tensor:
    """The value of a layer whose value residual reads nothing, on the heads that its form has."""
    repeated = form.value_residual in ("gated_repeated", "low_rank")
    return repeat_heads(rows.v, rows.r.shape[1]) if repeated else rows.v


class _Mix(torch.autograd.Function):
    """The two launches. Tensors come and go as the fields of ``naive``'s tuples, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, rope: Rope | None, starts: bool, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept = [None if x is None else x.contiguous() for x in tensors]
        ctx.form, ctx.rope = form, None if rope is None else tuple(x.contiguous() for x in rope)
        rows, weights, first = _grouped(kept)
        turns = rope is not None or weights.r_norm is not None
        mixed = Mixed(
            r=_like(_kept(rows.r, turns)),
            log_decay=torch.empty_like(rows.decay, dtype=torch.float32),
            k=torch.empty_like(rows.decay),
            v=_like(rows.value),
            a=torch.empty_like(rows.k),
            b=torch.empty_like(rows.decay),
        )
        k_first = torch.empty_like(rows.k) if starts else None
        bonus = None
        if weights.r_k is not None:
            bonus = rows.decay.new_empty(rows.decay.shape[:2], dtype=torch.float32)
        with torch.cuda.device_of(rows.k):
            forward_kernel[_grid(rows, FORWARD)](
                rows,
                weights,
                ctx.rope,
                first,
                mixed,
                bonus,
                k_first,
                len(rows.k),
                form.norm_eps,
                **_sizes(rows, form, FORWARD),
            )
        ctx.save_for_backward(*kept)
        return *mixed, bonus, k_first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, weights, first = _grouped(ctx.saved_tensors)
        upstream: list[Any] = [None if grad is None else grad.contiguous() for grad in grads]
        *dmixed, dbonus, dk_first = upstream
        drows = Rows(*map(_like, rows))._replace(v=_kept(_like(rows.v), rows.value is not None))
        needed = ctx.needs_input_grad[-len(first) :]
        dfirst = tuple(_like(x) if need else None for x, need in zip(first, needed, strict=True))
        partial = _partial_sums(rows, weights)
        with torch.cuda.device_of(rows.k):
            backward_kernel[_grid(rows, BACKWARD)](
                rows,
                weights,
                ctx.rope,
                first,
                Mixed(*dmixed),
                dbonus,
                dk_first,
                drows,
                partial,
                dfirst,
                len(rows.k),
                ctx.form.norm_eps,
                **_sizes(rows, ctx.form, BACKWARD),
            )
        dweights = (
            None if x is None or sums is None else sums.sum(0).view_as(x).to(x.dtype)
            for x, sums in zip(weights, partial, strict=True)
        )
        return None, None, None, *drows, *dweights, *dfirst


def _grouped(tensors: Sequence[Any]) -> tuple[Rows, Weights, tuple[Any, Any]]:
    """The tuples again, from their fields one after the other; what the kernels do not read is None."""
    split = len(Rows._fields)
    return Rows(*tensors[:split]), Weights(*tensors[split:-2]), (tensors[-2], tensors[-1])


def _kept(x: Any, keep: bool) -> Any:
    """x, or None, which tells a kernel to leave it out."""
    return x if keep else None


def _like(x: Tensor | None) -> Any:
    """Memory for a result of x's shape and dtype."""
    return None if x is None else torch.empty_like(x)


def _partial_sums(rows: Rows, weights: Weights) -> Weights:
    """Memory for the sums of one block of tokens each; every KV head has its own of the norms' weights."""
    programs = _grid(rows, BACKWARD)[0]
    blocks = programs // rows.k.shape[1]

    def sums(x: Tensor | None, count: int) -> Any:
        return None if x is None else x.new_empty(count, x.numel(), dtype=torch.float32)

    of_blocks = Weights(*(sums(x, blocks) for x in weights))
    return of_blocks._replace(r_norm=sums(weights.r_norm, programs), k_norm=sums(weights.k_norm, programs))


def _block(rows: Rows, launch: Launch) -> tuple[int, int]:
    """BT tokens and W columns of a tile: half a head, or where that is too wide what divides it."""
    half = rows.k.shape[2] // 2
    width = triton.next_power_of_2(half)
    if width > launch.width:
        width = min(half & -half, launch.width)
    return max(launch.size // width, 1), width


def _grid(rows: Rows, launch: Launch) -> tuple[int]:
    """One program per block of tokens and KV head, a block's heads beside one another as in memory."""
    return (triton.cdiv(len(rows.k), _block(rows, launch)[0]) * rows.k.shape[1],)


def _sizes(rows: Rows, form: Form, launch: Launch) -> dict[str, int | bool]:
    """The constants that a kernel is compiled for."""
    tokens, width = _block(rows, launch)
    return {
        "H": rows.decay.shape[1],
        "H_KV": rows.k.shape[1],
        "K": rows.k.shape[2],
        "LOG_LOG": form.key_scale == "log_log",
        "REPEATED": form.value_residual in ("gated_repeated", "low_rank"),
        "BT": tokens,
        "W": width,
        "STAGES": 2,
        "num_warps": launch.num_warps,
    }
