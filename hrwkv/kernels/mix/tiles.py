"""What the mixer's Triton kernels do to one tile: loads in fp32, rates, norm, RoPE, residuals.

A head is a tuple of n tiles [BT, W]: the first n / 2 are its lower half, each of the others holds what RoPE
pairs with one of these, element by element. So pairs lie in the same threads, and RoPE moves nothing between
them. W divides K / 2, or it is not less: then n is 2, and columns are masked. Any kernel that holds rows in
this form can call these. Equations are those of docs/hxa079.md. The functions of one number are written for
few instructions: compiled for sm_90, exp2, rsqrt and multiply-add take one each, exp five, a division nine,
log twenty-five.
"""

import triton
import triton.language as tl

from hrwkv.kernels.mix import naive

LOG2_E = tl.constexpr(1.4426950408889634)
HIGHEST_RATE = tl.constexpr(0.6065306597126334)  # exp(-0.5), the largest -log_decay
LOW_RANK_VALUE_SCALE = tl.constexpr(naive.LOW_RANK_VALUE_SCALE)


@triton.jit
def load(pointer, offsets, mask):
    """Load a tile in fp32, zero where masked."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, offsets, x, mask):
    """Round a tile to what the pointer holds."""
    tl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def inverse(x):
    """1 / x for x >= 1, inf included: two instructions instead of nine, a few last places off."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return inverse(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], off by 4e-8 at most: a third of tl.log's instructions.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 4.1.44.
    """
    y = 0.0360884937 - 0.0064535442 * x
    y = -0.0953293897 + y * x
    y = 0.1676540711 + y * x
    y = -0.2407338084 + y * x
    y = 0.3317990258 + y * x
    y = -0.4998741238 + y * x
    return (0.9999964239 + y * x) * x


@triton.jit
def offset(i, K: tl.constexpr, W: tl.constexpr):
    """Where tile ``i`` begins in its head."""
    return i // ((K // 2 + W - 1) // W) * (K // 2) + i % ((K // 2 + W - 1) // W) * W


@triton.jit
def load_head(pointer, at, live, K: tl.constexpr, W: tl.constexpr):
    """The tiles of a head in fp32; ``at`` are the offsets of the first."""
    x = ()
    for i in tl.static_range(2 * ((K // 2 + W - 1) // W)):
        x = x + (load(pointer, at + offset(i, K, W), live),)
    return x


@triton.jit
def store_head(pointer, at, x, live, K: tl.constexpr, W: tl.constexpr):
    """Round the tiles to what the pointer holds."""
    for i in tl.static_range(len(x)):
        store(pointer, at + offset(i, K, W), x[i], live)


@triton.jit
def multiply(x, y):
    """Head times head, element by element."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] * y[i],)
    return z


@triton.jit
def scaled(x, factor):
    """Head times what a token or all of them have in common."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] * factor,)
    return z


@triton.jit
def add(x, y):
    """Head plus head."""
    z = ()
    for i in tl.static_range(len(x)):
        z = z + (x[i] + y[i],)
    return z


@triton.jit
def sum_row(x, y):
    """The product of two heads, [BT, 1]."""
    total = x[0] * y[0]
    for i in tl.static_range(1, len(x)):
        total += x[i] * y[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def rates(decay, iclr, LOG_LOG: tl.constexpr):
    """From the logits of (7) and (8): iclr, log_decay, the key's factor of (10) or (33), and dw / ddecay.

    The exponential is of -|decay|, so it neither overflows nor leaves the range of ``log1p``.
    """
    small = tl.exp2(tl.abs(decay) * -LOG2_E)
    large_sigmoid = inverse(1.0 + small)
    small_sigmoid = small * large_sigmoid
    log_decay = -HIGHEST_RATE * tl.where(decay > 0, large_sigmoid, small_sigmoid)
    slope = tl.where(decay > 0, small_sigmoid, large_sigmoid)  # sigmoid(-decay)
    iclr = sigmoid(iclr)
    if LOG_LOG:
        factor = 1.5 + tl.maximum(-decay, 0.0) + log1p(small) + iclr  # 1 - w + iclr
    else:
        factor = 1.0 - tl.exp2(log_decay * LOG2_E) + iclr
    return iclr, log_decay, factor, slope


@triton.jit
def load_normed(pointer, at, live, weight, column, eps, K: tl.constexpr, W: tl.constexpr):
    """r or k after its norm (3), if it has one."""
    x = load_head(pointer, at, live, K, W)
    if weight is not None:
        scale = tl.rsqrt(sum_row(x, x) / K + eps)
        x = multiply(scaled(x, scale), load_head(weight, column, live, K, W))
    return x


@triton.jit
def norm_backward(dy, pointer, at, live, weight, column, eps, K: tl.constexpr, W: tl.constexpr):
    """Gradients through (3): of the head, and of the weight before the sum over tokens."""
    x = load_head(pointer, at, live, K, W)
    scale = tl.rsqrt(sum_row(x, x) / K + eps)
    normed = scaled(x, scale)
    dnormed = multiply(dy, load_head(weight, column, live, K, W))
    along = -sum_row(dnormed, normed) / K
    return scaled(add(dnormed, scaled(normed, along)), scale), multiply(dy, normed)


@triton.jit
def rotate(x, angles, SIGN: tl.constexpr):
    """RoPE (4) by the angles' cos and sin; with SIGN -1 its transpose, which is its backward."""
    M: tl.constexpr = len(x) // 2
    low = ()
    high = ()
    for i in tl.static_range(M):
        cos, sin = angles[0][i], angles[1][i] * SIGN
        low = low + (x[i] * cos - x[i + M] * sin,)
        high = high + (x[i + M] * cos + x[i] * sin,)
    return low + high


@triton.jit
def residual(own, offsets, live, rows, bias, vector, first):
    """own moved towards layer 0's by a gate (5, 6, 31); without a layer 0, the product added (32)."""
    x = load(rows, offsets, live)
    if first is None:
        y = own + LOW_RANK_VALUE_SCALE * x
    else:
        y = own + (load(first, offsets, live) - own) * sigmoid(load(bias, vector, live) + x)
    return y


@triton.jit
def residual_backward(dy, own, offsets, live, rows, bias, vector, first, drows, dfirst):
    """Store the gradients of the product and of layer 0's; return own's, and the bias's before its sum."""
    if first is None:
        down = dy
        dlogit = LOW_RANK_VALUE_SCALE * dy
    else:
        gate = sigmoid(load(bias, vector, live) + load(rows, offsets, live))
        down = dy * (1.0 - gate)
        dlogit = dy * (load(first, offsets, live) - own) * gate * (1.0 - gate)
        if dfirst is not None:
            store(dfirst, offsets, dy * gate, live)
    store(drows, offsets, dlogit, live)
    return down, dlogit


@triton.jit
def load_own_key(rows, weights, angles, kv, live, column, eps, K: tl.constexpr, W: tl.constexpr):
    """The key after (3) and (4)."""
    k = load_normed(rows.k, kv, live, weights.k_norm, column, eps, K, W)
    if len(angles) > 0:
        k = rotate(k, angles, 1)
    return k


@triton.jit
def load_key(
    rows, weights, angles, first, kv, live, vector, column, eps, K: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """The key after (6), as (9) and (10) take it."""
    own = load_own_key(rows, weights, angles, kv, live, column, eps, K, W)
    if rows.key is None:
        k = own
    else:
        k = ()
        for i in tl.static_range(len(own)):
            at, n = kv + offset(i, K, W), vector + offset(i, K, W)
            k = k + (residual(own[i], at, live, rows.key, weights.k0, n, first[1]),)
    return k


@triton.jit
def store_sum(pointer, at, x, K: tl.constexpr, W: tl.constexpr):
    """Write the sum of a tile over its tokens to its place in a row of partial sums."""
    column = tl.arange(0, W)
    tl.store(pointer + at + column, tl.sum(x, 0), mask=column < K // 2)


@triton.jit
def store_sums(pointer, other, at, x, y, K: tl.constexpr, W: tl.constexpr):
    """The same for two at once, in one exchange between threads."""
    column = tl.arange(0, W)
    sum_x, sum_y = tl.split(tl.sum(tl.join(x, y), 0))
    tl.store(pointer + at + column, sum_x, mask=column < K // 2)
    tl.store(other + at + column, sum_y, mask=column < K // 2)


@triton.jit
def locate(T, H_KV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, W: tl.constexpr):
    """KV head and first token of a program; tokens [BT, 1], columns and mask [BT, W] of a first tile.

    Columns are a whole tile because a load of [1, W] would get a layout of its own, and with it a conversion
    through shared memory for each vector of each head.
    """
    start = (tl.program_id(0) // H_KV).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    column = tl.broadcast_to(tl.arange(0, W)[None, :], (BT, W))
    live = (start + token < T) & (column < K // 2)
    return tl.program_id(0) % H_KV, start, token, column, live


@triton.jit
def load_angles(rope, start, token, column, live, K: tl.constexpr, W: tl.constexpr):
    """cos and sin of a head's pairs, a tuple of tiles each; without a position encoding an empty tuple."""
    if rope is None:
        angles = ()
    else:
        cos = ()
        sin = ()
        for i in tl.static_range((K // 2 + W - 1) // W):
            at = start * (K // 2) + token * (K // 2) + column + i * W
            cos = cos + (load(rope[0], at, live),)
            sin = sin + (load(rope[1], at, live),)
        angles = cos, sin
    return angles
