"""Triton kernels of the chunked recurrence that both directions need: ``prepare`` and ``walk``.

hxa079.md (18) to (21), with everything that does not depend on a state pulled out of the loop over chunks.
``prepare`` works on all chunks at once and leaves, for every chunk and head,

    M  = (I - P_ab)^-1              W  = M A,  R                                  [C, K]
    Q  = M P_ak                     P_rk,  P_rb                                   [C, C]
    B' = exp(G_C) B^,  K' = exp(G_C) K^                                           [C, K]

so that ``walk`` has two dependent products a chunk in either direction (all names as in the code):

    forward   U  = W S + Q V            S <- exp(G_C) S + B'^T U + K'^T V     O  = R S + P_rb U + P_rk V
    backward  dU = B' dS + P_rb^T dO    dS <- exp(G_C) dS + W^T dU + R^T dO   dV = K' dS + Q^T dU + P_rk^T dO

``walk`` holds the state transposed, [V, K]: then S^T and U^T are the left operands of the next product and go
from one to the other in registers, and every warp owns its rows of V without meeting another.

Rounding: with repeated keys, the worst case, every bf16 tensor between the inputs and the state adds about a
tenth of its error (docs/log.md). So O is not made of R + P_rb W, which rounds R twice, U reaches the state in
two parts, and W's factors are two fp16 parts of M, fp16 of A.

Range: exp(-G) is at most e^(0.6065 C), 2.7e8 for C = 32, so half precision here is bf16, and a mean log_decay
below -2.7 a token overflows. The inverse is made by blocks (two inverted blocks become one of twice the
size), never by the doubling product, which repeated keys make useless (docs/log.md).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(x, rows, columns, mask, WIDTH: tl.constexpr):
    """Rows [C] (in rows of ``WIDTH``), columns [k] -> fp32 [C, k], zeros where masked."""
    return tl.load(x + rows[:, None] * WIDTH + columns[None, :], mask=mask[:, None], other=0.0).to(tl.float32)


@triton.jit
def rounded(x, DOT: tl.constexpr):
    """fp32 ``x`` rounded to the precision of ``DOT``, halves up, still fp32.

    By bits, because a cast that is also widened again takes the slowest unit of an NVIDIA chip.
    """
    if DOT == tl.bfloat16:  # noqa: SIM300 (DOT is no constant)
        x = ((x.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)
    if DOT == tl.float16:  # noqa: SIM300
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def halves(x, DOT: tl.constexpr):
    """fp32 ``x`` as two of ``DOT``: the rounded one and what is left (nothing in fp32)."""
    high = rounded(x, DOT)
    return high.to(DOT), (x - high).to(DOT)


@triton.jit
def dot_halves(high, low, right, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``total + (high + low) @ right``, where the left side is too exact for one ``DOT``."""
    total = tl.dot(high, right, total, input_precision=PRECISION)
    if DOT != tl.float32:  # noqa: SIM300
        total = tl.dot(low, right, total)
    return total


@triton.jit
def running_sum(keep, x, DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr = False):
    """``keep @ x`` for a 0/1 matrix and fp32 ``x``, split into two bf16 where one is not ``EXACT``."""
    if DOT == tl.bfloat16 and not EXACT:  # noqa: SIM300
        high, low = halves(x, DOT)
        total = tl.dot(keep.to(DOT), high)
        total = tl.dot(keep.to(DOT), low, total)
    else:
        total = tl.dot(keep.to(DOT), x.to(DOT), input_precision=PRECISION)
    return total


@triton.jit
def unit_lower_inverse(strict, SIZE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I - strict)^-1`` for a strictly lower ``[SIZE, SIZE]`` matrix, merging inverted diagonal blocks.

    Both sides of each product in two ``DOT``: more exact than tf32, and bf16 needs no exchange between
    threads to become a left operand again.
    """
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inverse = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, strict, 0.0))
    strict_high, strict_low = halves(strict, DOT)
    zeros = tl.zeros([SIZE, SIZE], tl.float32)
    for level in tl.static_range(1, 8):
        if 2**level < SIZE:
            small = row // 2**level == column // 2**level
            large = row // 2 ** (level + 1) == column // 2 ** (level + 1)
            high, low = halves(inverse, DOT)
            half = dot_halves(high, low, strict_high, zeros, DOT, PRECISION)
            if DOT != tl.float32:  # noqa: SIM300
                half = tl.dot(high, strict_low, half)
            half_high, half_low = halves(tl.where(large & (small == 0), half, 0.0), DOT)
            inverse = dot_halves(half_high, half_low, high, inverse, DOT, PRECISION)
            if DOT != tl.float32:  # noqa: SIM300
                inverse = tl.dot(half_high, low, inverse)
    return inverse


@triton.jit
def prepare(
    r,
    log_decay,
    k,
    a,
    b,
    chunks,
    w_out,
    r_out,
    b_out,
    k_out,
    q_out,
    p_rk_out,
    p_rb_out,
    m_out,
    decay_out,
    num_chunks,
    H: tl.constexpr,
    H_A: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    PER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (head, PER chunks): the next chunk's inputs are on their way while one is worked on.

    ``chunks [NT, 2]`` int32: first token and number of tokens. Outputs [NT, H, C, K] and [NT, H, C, C] in
    ``DOT``, ``decay_out [NT, H, K]`` fp32; ``m_out`` is written where ``BACKWARD``.
    """
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PER
    step = tl.arange(0, C)
    lower = step[:, None] >= step[None, :]
    strictly_lower = step[:, None] > step[None, :]
    # A and M are bounded, whatever the scale of k, v and the state: W's factors may have fp16's three bits
    # more.
    FINE: tl.constexpr = tl.float16 if DOT == tl.bfloat16 else DOT  # noqa: SIM300
    exact: tl.constexpr = log_decay.dtype.element_ty == DOT
    for chunk in tl.range(first, min(num_chunks, first + PER), num_stages=STAGES):
        start = tl.load(chunks + 2 * chunk).to(tl.int64)
        present = step < tl.load(chunks + 2 * chunk + 1)
        tokens = (start * H + head) * K
        tokens_a = (start * H_A + head // (H // H_A)) * K
        place = head + chunk * H
        p_ab = tl.zeros([C, C], tl.float32)
        p_ak = tl.zeros([C, C], tl.float32)
        p_rb = tl.zeros([C, C], tl.float32)
        p_rk = tl.zeros([C, C], tl.float32)
        same = tl.zeros([C], tl.float32)
        a_tiles = ()
        for i in tl.static_range(K // TK):
            columns = i * TK + tl.arange(0, TK)
            g = load_tile(log_decay + tokens, step * H, columns, present, K)
            total = running_sum(lower, g, DOT, PRECISION, exact) * LOG2E
            grow = tl.exp2(total)
            shrink = tl.exp2(-total)
            before = tl.exp2(running_sum(strictly_lower, g, DOT, PRECISION, exact) * LOG2E)
            ending = running_sum(tl.full([C, C], 1.0, tl.float32), g, DOT, PRECISION, exact)  # all rows alike
            remain = tl.exp2(ending * LOG2E - total)
            a_tile = load_tile(a + tokens_a, step * H_A, columns, present, K) * before
            r_tile = load_tile(r + tokens, step * H, columns, present, K)
            k_tile = load_tile(k + tokens, step * H, columns, present, K)
            b_tile = load_tile(b + tokens, step * H, columns, present, K)
            same += tl.sum(r_tile * k_tile, axis=1)
            a_hat = a_tile.to(DOT)
            r_hat = (r_tile * grow).to(DOT)
            b_right = tl.trans((b_tile * shrink).to(DOT))
            k_right = tl.trans((k_tile * shrink).to(DOT))
            out = place * (C * K) + (step[:, None] * K + columns[None, :])
            tl.store(r_out + out, r_hat)
            tl.store(b_out + out, (b_tile * remain).to(DOT))
            tl.store(k_out + out, (k_tile * remain).to(DOT))
            ends = decay_out + place * K + tl.broadcast_to(columns[None, :], (C, TK))
            tl.store(ends, grow, mask=(step == C - 1)[:, None])
            p_ab = tl.dot(a_hat, b_right, p_ab, input_precision=PRECISION)
            p_ak = tl.dot(a_hat, k_right, p_ak, input_precision=PRECISION)
            p_rb = tl.dot(r_hat, b_right, p_rb, input_precision=PRECISION)
            p_rk = tl.dot(r_hat, k_right, p_rk, input_precision=PRECISION)
            a_tiles = a_tiles + (a_tile.to(FINE),)

        # Repeated keys need more of M than bf16 holds, and a token's own share r k, where the decay is no
        # factor, is most of its output where the decay is fast.
        solve = unit_lower_inverse(tl.where(strictly_lower, p_ab, 0.0), C, DOT, PRECISION)
        high, low = halves(solve, DOT)
        p_ak_low = tl.where(strictly_lower, p_ak, 0.0).to(DOT)
        q = dot_halves(high, low, p_ak_low, tl.zeros([C, C], tl.float32), DOT, PRECISION)
        square = place * (C * C) + (step[:, None] * C + step[None, :])
        tl.store(q_out + square, q.to(DOT))
        p_rk = tl.where(strictly_lower, p_rk, tl.where(lower, same[:, None], 0.0))
        tl.store(p_rk_out + square, p_rk.to(DOT))
        tl.store(p_rb_out + square, tl.where(lower, p_rb, 0.0).to(DOT))
        if BACKWARD:
            tl.store(m_out + square, high)
        high, low = halves(solve, FINE)
        for i in tl.static_range(K // TK):
            out = place * (C * K) + (step[:, None] * K + (i * TK + tl.arange(0, TK))[None, :])
            w = dot_halves(high, low, a_tiles[i], tl.zeros([C, TK], tl.float32), FINE, PRECISION)
            tl.store(w_out + out, w.to(DOT))


@triton.jit
def walk(
    read,
    write,
    mix,
    feed,
    decay,
    q,
    p_rk,
    p_rb,
    m,
    x,
    y,
    inner,
    states,
    initial,
    final,
    cu_seqlens,
    cu_chunks,
    H: tl.constexpr,
    H_X: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (block of BV values, head, sequence): carry the state, or backwards its gradient.

    ``x`` is V or dO, ``y [T, H, V]`` O or dV; (read, write, mix, feed) are (W, B', E, K'), backwards
    (B', W, K', E). ``initial`` and ``final`` [N, H, K, V] fp32. ``KEEP`` writes what ``gradients`` needs: the
    state before each chunk (in walking order) to ``states`` [NT, H, V, K], U or dY to ``inner`` [NT, H, C,
    V]. BV may reach beyond V.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // blocks  # one axis: CUDA's others end at 65,535
    value = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    inside = value < V
    head = pair % H
    sequence = pair // H
    first_token = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - first_token).to(tl.int32)
    first_chunk = tl.load(cu_chunks + sequence).to(tl.int64)
    num_chunks = tl.cdiv(length, C)
    step = tl.arange(0, C)
    key = tl.arange(0, TK)
    x += (first_token * H_X + head // (H // H_X)) * V
    y += (first_token * H + head) * V
    ends = (sequence.to(tl.int64) * H + head) * K * V + key[None, :] * V + value[:, None]  # transposed

    state = ()
    for i in tl.static_range(K // TK):
        if HAS_INITIAL:
            at_start = tl.load(initial + ends + i * TK * V, mask=inside[:, None], other=0.0)
            state = state + (at_start.to(tl.float32),)
        else:
            state = state + (tl.zeros([BV, TK], tl.float32),)
    for at in tl.range(0, num_chunks, num_stages=STAGES):
        n = at
        if REVERSE:
            n = num_chunks - 1 - at
        base = (first_chunk + n) * H + head
        tokens = n * C + step
        present = tokens < length
        tile = base * (C * K) + (step[:, None] * K + key[None, :])
        square = base * (C * C) + (step[:, None] * C + step[None, :])
        x_offsets = tokens.to(tl.int64)[:, None] * (H_X * V) + value[None, :]
        mask = present[:, None] & inside[None, :]
        x_left = tl.trans(tl.load(x + x_offsets, mask=mask, other=0.0).to(DOT))  # [BV, C]
        low = ()
        for i in tl.static_range(K // TK):
            low = low + (state[i].to(DOT),)
            if KEEP:
                at_state = base * (V * K) + (value[:, None] * K + (i * TK + key)[None, :])
                tl.store(states + at_state, low[i], mask=inside[:, None])
        # From x to the inner vectors, from x to y, and from the inner vectors to y.
        if REVERSE:
            x_inner, x_y, inner_y = tl.load(p_rb + square), tl.load(p_rk + square), tl.load(q + square)
        else:
            x_inner = tl.trans(tl.load(q + square))
            x_y = tl.trans(tl.load(p_rk + square))
            inner_y = tl.trans(tl.load(p_rb + square))
        u = tl.dot(x_left, x_inner, input_precision=PRECISION)
        out = tl.dot(x_left, x_y, input_precision=PRECISION)
        for i in tl.static_range(K // TK):
            u = tl.dot(low[i], tl.trans(tl.load(read + tile + i * TK)), u, input_precision=PRECISION)
        u_left, u_low = halves(u, DOT)
        for i in tl.static_range(K // TK):
            out = tl.dot(low[i], tl.trans(tl.load(mix + tile + i * TK)), out, input_precision=PRECISION)
        out = tl.dot(u_left, inner_y, out, input_precision=PRECISION)
        y_offsets = tokens.to(tl.int64)[:, None] * (H * V) + value[None, :]
        tl.store(y + y_offsets, tl.trans(out.to(y.dtype.element_ty)), mask=mask)
        if KEEP:
            kept = u_left
            if REVERSE:  # dY = M^T dU
                kept = tl.dot(u_left, tl.load(m + square), input_precision=PRECISION).to(DOT)
            at_inner = base * (C * V) + (step[:, None] * V + value[None, :])
            tl.store(inner + at_inner, tl.trans(kept), mask=inside[None, :])
        after = ()
        for i in tl.static_range(K // TK):
            s = state[i] * tl.load(decay + base * K + i * TK + key)[None, :]
            s = tl.dot(x_left, tl.load(feed + tile + i * TK), s, input_precision=PRECISION)
            write_tile = tl.load(write + tile + i * TK)
            if REVERSE:
                s = tl.dot(u_left, write_tile, s, input_precision=PRECISION)
            else:  # the state is summed over all tokens, so it gets all of U
                s = dot_halves(u_left, u_low, write_tile, s, DOT, PRECISION)
            after = after + (s,)
        state = after
    for i in tl.static_range(K // TK):
        tl.store(final + ends + i * TK * V, state[i], mask=inside[:, None])
