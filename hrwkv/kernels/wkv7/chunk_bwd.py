"""Triton kernel of the chunked recurrence's gradients: all chunks at once, hxa079.md (22).

By then ``walk`` has been through the chunks in both directions, so each chunk knows the state S before it, the
gradient dS of the state after it, U and dY, and dV is done. A program makes the gradients of one block of key columns;
the four [C, C] matrices of (22e) are made again for each block, which costs less than a trip through memory.

dlog_decay is a difference of large sums that nearly cancel. They do so exactly here, because the products
r dr, k dk, .. are taken of the same rounded vectors as the matrix products.
"""

import triton
import triton.language as tl

from hrwkv.kernels.wkv7.chunk_fwd import LOG2E, load_tile, rounded, running_sum, tile_columns


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
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (block of TK keys, head, chunk).

    ``states``, ``dstates`` [NT, H, V, K] and ``u``, ``dy`` [NT, H, C, V] in ``DOT``; outputs [T, H, K].
    """
    columns = tl.program_id(0) * TK + tl.arange(0, TK)
    head = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    count = tl.load(chunks + 2 * chunk + 1)
    step = tl.arange(0, C)
    present = step < count
    lower = step[:, None] >= step[None, :]
    strictly_lower = step[:, None] > step[None, :]
    first = (start * H + head) * K
    do += (start * H + head) * V
    v += (start * H_V + head // (H // H_V)) * V
    a += (start * H_A + head // (H // H_A)) * K
    u += (chunk * H + head) * (C * V)
    dy += (chunk * H + head) * (C * V)
    states += (chunk * H + head) * (V * K)
    dstates += (chunk * H + head) * (V * K)

    dp_ab = tl.zeros([C, C], tl.float32)
    dp_ak = tl.zeros([C, C], tl.float32)
    dp_rb = tl.zeros([C, C], tl.float32)
    dp_rk = tl.zeros([C, C], tl.float32)
    da_end = tl.zeros([C, TK], tl.float32)
    dr_end = tl.zeros([C, TK], tl.float32)
    db_end = tl.zeros([C, TK], tl.float32)
    dk_end = tl.zeros([C, TK], tl.float32)
    dending = tl.zeros([TK], tl.float32)
    for j in tl.static_range((V + TV - 1) // TV):
        values = tile_columns(j, V, TV)
        inner = step[:, None] * V + values[None, :]
        of_state = values[:, None] * K + columns[None, :]
        v_tile = load_tile(v, step * H_V, values, present, V).to(DOT)
        do_tile = load_tile(do, step * H, values, present, V).to(DOT)
        u_tile = tl.load(u + inner)
        y_tile = tl.load(dy + inner)
        u_right = tl.trans(u_tile)
        v_right = tl.trans(v_tile)
        dp_ab = tl.dot(y_tile, u_right, dp_ab, input_precision=PRECISION)
        dp_ak = tl.dot(y_tile, v_right, dp_ak, input_precision=PRECISION)
        dp_rb = tl.dot(do_tile, u_right, dp_rb, input_precision=PRECISION)
        dp_rk = tl.dot(do_tile, v_right, dp_rk, input_precision=PRECISION)
        state = tl.load(states + of_state)
        dstate = tl.load(dstates + of_state)
        da_end = tl.dot(y_tile, state, da_end, input_precision=PRECISION)
        dr_end = tl.dot(do_tile, state, dr_end, input_precision=PRECISION)
        db_end = tl.dot(u_tile, dstate, db_end, input_precision=PRECISION)
        dk_end = tl.dot(v_tile, dstate, dk_end, input_precision=PRECISION)
        dending += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=0)
    ab = tl.where(strictly_lower, dp_ab, 0.0).to(DOT)
    ak = tl.where(strictly_lower, dp_ak, 0.0).to(DOT)
    rb = tl.where(lower, dp_rb, 0.0).to(DOT)
    rk = tl.where(lower, dp_rk, 0.0).to(DOT)

    g = load_tile(log_decay + first, step * H, columns, present, K) * LOG2E
    total = running_sum(lower, g, DOT, PRECISION)
    ending = tl.exp2(tl.sum(g, axis=0))
    grow = tl.exp2(total)
    shrink = tl.exp2(-total)
    before = tl.exp2(total - g)
    a_wide = rounded(load_tile(a, step * H_A, columns, present, K) * before, DOT)
    r_wide = rounded(load_tile(r + first, step * H, columns, present, K) * grow, DOT)
    b_wide = rounded(load_tile(b + first, step * H, columns, present, K) * shrink, DOT)
    k_wide = rounded(load_tile(k + first, step * H, columns, present, K) * shrink, DOT)
    a_hat = a_wide.to(DOT)
    r_hat = r_wide.to(DOT)
    b_hat = b_wide.to(DOT)
    k_hat = k_wide.to(DOT)
    da_hat = tl.dot(ab, b_hat, da_end, input_precision=PRECISION)
    da_hat = tl.dot(ak, k_hat, da_hat, input_precision=PRECISION)
    dr_hat = tl.dot(rb, b_hat, dr_end, input_precision=PRECISION)
    dr_hat = tl.dot(rk, k_hat, dr_hat, input_precision=PRECISION)
    db_end *= ending[None, :]
    dk_end *= ending[None, :]
    db_hat = tl.dot(tl.trans(ab), a_hat, db_end, input_precision=PRECISION)
    db_hat = tl.dot(tl.trans(rb), r_hat, db_hat, input_precision=PRECISION)
    dk_hat = tl.dot(tl.trans(ak), a_hat, dk_end, input_precision=PRECISION)
    dk_hat = tl.dot(tl.trans(rk), r_hat, dk_hat, input_precision=PRECISION)

    out = first + ((step * H)[:, None] * K + columns[None, :])
    kind = dr.dtype.element_ty
    tl.store(dr + out, (dr_hat * grow).to(kind), mask=present[:, None])
    tl.store(da + out, (da_hat * before).to(kind), mask=present[:, None])
    tl.store(db + out, (db_hat * shrink).to(kind), mask=present[:, None])
    tl.store(dk + out, (dk_hat * shrink).to(kind), mask=present[:, None])

    at = r_wide * dr_hat - b_wide * db_hat - k_wide * dk_hat
    of_end = dending * ending + tl.sum(b_wide * db_end + k_wide * dk_end, axis=0)
    dg = running_sum(tl.trans(lower), at, DOT, PRECISION)
    dg += running_sum(tl.trans(strictly_lower), a_wide * da_hat, DOT, PRECISION)
    tl.store(dlog_decay + out, (dg + of_end[None, :]).to(dlog_decay.dtype.element_ty), mask=present[:, None])
