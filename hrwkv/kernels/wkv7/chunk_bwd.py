"""Triton kernel of the chunked recurrence's gradients: all chunks at once, hxa079.md (22).

By then ``walk`` has been through the chunks in both directions, so each chunk knows the state S before it,
the gradient dS of the state after it, U and dY, and dV is done. Vectors that play the same part are stacked,
[A; R], [B; K^], [dY; dO] and [U; Vm], 2C rows each: five products instead of twenty, tall enough for every
matrix unit.

dlog_decay is a difference of large sums that nearly cancel. They do so exactly here, because the products
r dr, k dk, .. are taken of the same rounded vectors as the matrix products.
"""

import triton
import triton.language as tl

from hrwkv.kernels.wkv7.chunk_fwd import LOG2E, load_tile, rounded, running_sum


@triton.jit
def stacked(upper, lower, row_upper, row_lower, columns, first, mask):
    """Load [2C, k]: rows of ``upper`` where ``first``, those of ``lower`` below; row offsets in elements."""
    if tl.target_info.is_hip():  # AMD's compiler takes no address that may lie in either of two tensors
        above = tl.load(
            upper + row_upper[:, None] + columns[None, :], mask=(mask & first)[:, None], other=0.0
        )
        below = (mask & (first == 0))[:, None]
        x = tl.load(lower + row_lower[:, None] + columns[None, :], mask=below, other=0.0)
        x = tl.where(first[:, None], above, x)
    else:
        rows = tl.where(first, upper + row_upper, lower + row_lower)
        x = tl.load(rows[:, None] + columns[None, :], mask=mask[:, None], other=0.0)
    return x


@triton.jit
def store_stacked(upper, lower, x, rows, columns, first, mask):
    """Store [2C, k] where ``stacked`` loads it, with the row offsets ``rows`` in both tensors."""
    if tl.target_info.is_hip():
        place = rows[:, None] + columns[None, :]
        tl.store(upper + place, x, mask=(mask & first)[:, None])
        tl.store(lower + place, x, mask=(mask & (first == 0))[:, None])
    else:
        places = tl.where(first, upper + rows, lower + rows)
        tl.store(places[:, None] + columns[None, :], x, mask=mask[:, None])


@triton.jit
def gradients(
    r,
    log_decay,
    k,
    v,
    a,
    b,
    do,
    u,
    dy,
    states,
    dstates,
    chunks,
    dr,
    dlog_decay,
    dk,
    da,
    db,
    H: tl.constexpr,
    H_A: tl.constexpr,
    H_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    TV: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (head, chunk), which goes through the keys TK at a time.

    ``states``, ``dstates`` [NT, H, V, K] and ``u``, ``dy`` [NT, H, C, V]; outputs [T, H, K]; all but
    log_decay in ``DOT``.
    """
    head = tl.program_id(0) % H
    chunk = (tl.program_id(0) // H).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    count = tl.load(chunks + 2 * chunk + 1)
    row = tl.arange(0, 2 * C)
    first = row < C
    step = row % C
    present = step < count
    at = step * (H * K)
    at_a = step * (H_A * K)
    tokens = (start * H + head) * K
    r += tokens
    k += tokens
    b += tokens
    log_decay += tokens
    dr += tokens
    dk += tokens
    da += tokens
    db += tokens
    dlog_decay += tokens
    a += (start * H_A + head // (H // H_A)) * K
    v += (start * H_V + head // (H // H_V)) * V
    do += (start * H + head) * V
    u += (chunk * H + head) * (C * V)
    dy += (chunk * H + head) * (C * V)
    states += (chunk * H + head) * (V * K)
    dstates += (chunk * H + head) * (V * K)
    chunk_row = tl.arange(0, C)
    exact: tl.constexpr = log_decay.dtype.element_ty == DOT
    allowed = (step[:, None] > step[None, :]) | ((step[:, None] == step[None, :]) & (row >= C)[:, None])

    # [dP_ab, dP_ak; dP_rb, dP_rk] = tril([dY; dO] [U; Vm]^T) of (22e), once for all keys.
    dp = tl.zeros([2 * C, 2 * C], tl.float32)
    left = ()
    right = ()
    for j in tl.static_range(V // TV):
        values = j * TV + tl.arange(0, TV)
        left = left + (stacked(dy, do, step * V, step * (H * V), values, first, present),)
        right = right + (stacked(u, v, step * V, step * (H_V * V), values, first, present),)
        dp = tl.dot(left[j], tl.trans(right[j]), dp, input_precision=PRECISION)
    dp_low = tl.where(allowed, dp, 0.0).to(DOT)

    # What does not depend on the keys stays inside: outside it would hold registers that the tiles need.
    for i in tl.range(0, K // TK, num_stages=STAGES, disable_licm=True):
        columns = i * TK + tl.arange(0, TK)
        dar = tl.zeros([2 * C, TK], tl.float32)
        dbk_end = tl.zeros([2 * C, TK], tl.float32)
        dending = tl.zeros([TV, TK], tl.float32)
        for j in tl.static_range(V // TV):
            values = j * TV + tl.arange(0, TV)
            of_state = values[:, None] * K + columns[None, :]
            state = tl.load(states + of_state)
            dstate = tl.load(dstates + of_state)
            if DOT == tl.float32:  # noqa: SIM300 (shared memory holds them in half precision only)
                left_tile = stacked(dy, do, step * V, step * (H * V), values, first, present)
                right_tile = stacked(u, v, step * V, step * (H_V * V), values, first, present)
            else:
                left_tile = left[j]
                right_tile = right[j]
            dar = tl.dot(left_tile, state, dar, input_precision=PRECISION)
            dbk_end = tl.dot(right_tile, dstate, dbk_end, input_precision=PRECISION)
            dending += state.to(tl.float32) * dstate.to(tl.float32)
        g = load_tile(log_decay, chunk_row * H, columns, chunk_row < count, K)  # [C, TK]
        ending = tl.exp2(running_sum(tl.full([2 * C, C], 1.0, tl.float32), g, DOT, PRECISION, exact) * LOG2E)
        grow = (step + (row >= C))[:, None] > chunk_row[None, :]
        grow = tl.exp2(running_sum(grow, g, DOT, PRECISION, exact) * LOG2E)
        shrink = step[:, None] >= chunk_row[None, :]
        shrink = tl.exp2(running_sum(shrink, g, DOT, PRECISION, exact) * -LOG2E)
        ar = rounded(stacked(a, r, at_a, at, columns, first, present).to(tl.float32) * grow, DOT)
        bk = rounded(stacked(b, k, at, at, columns, first, present).to(tl.float32) * shrink, DOT)
        dar = tl.dot(dp_low, bk.to(DOT), dar, input_precision=PRECISION)
        dbk = tl.dot(tl.trans(dp_low), ar.to(DOT), input_precision=PRECISION)
        dbk_end *= ending
        store_stacked(da, dr, (dar * grow).to(DOT), at, columns, first, present)
        store_stacked(db, dk, ((dbk + dbk_end) * shrink).to(DOT), at, columns, first, present)
        # (22h): a_t depends on G_{t-1}, r_t on G_t, b_t and k_t on -G_t and, through the chunk's end, on G_C.
        # The sums are products of 2C rows, of which C count: so all stays in the threads where it is.
        of_ar = ar * dar
        dg = running_sum(step[None, :] >= row[:, None], of_ar - bk * dbk, DOT, PRECISION)
        dg += running_sum(step[None, :] < row[:, None], bk * dbk_end, DOT, PRECISION)
        dg += running_sum(tl.full([2 * C, TV], 1.0, tl.float32), dending, DOT, PRECISION) * ending
        dg -= tl.where(first[:, None], of_ar, 0.0)
        tl.store(
            dlog_decay + (row * (H * K))[:, None] + columns[None, :],
            dg.to(dlog_decay.dtype.element_ty),
            mask=(row < count)[:, None],
        )
