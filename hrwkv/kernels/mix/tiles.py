"""What the mixer's Triton kernels do to one tile: loads in fp32, rates, norm, RoPE, residuals.

A head is two tiles [BT, P], of tokens and P >= K / 2 pairs: its halves, which RoPE pairs element by element.
As two tiles they lie in the same threads, so RoPE and norms move nothing through shared memory. Equations are those of docs/hxa079.md. The functions of
one number are written for few instructions: compiled for sm_90, exp2, rsqrt and multiply-add take one each,
exp five, a division nine, log twenty-five.
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
def load_head(pointer, offsets, live, K: tl.constexpr):
    """Both halves of a head in fp32; ``offsets`` are those of the low one."""
    return load(pointer, offsets, live), load(pointer, offsets + K // 2, live)


@triton.jit
def store_head(pointer, offsets, x, live, K: tl.constexpr):
    """Round both halves to what the pointer holds."""
    store(pointer, offsets, x[0], live)
    store(pointer, offsets + K // 2, x[1], live)


@triton.jit
def sum_row(x, y):
    """The product of two heads, [BT, 1]."""
    return tl.sum(x[0] * y[0] + x[1] * y[1], 1)[:, None]


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
def load_normed(pointer, offsets, live, weight, pair, eps, K: tl.constexpr):
    """r or k after its norm (3), if it has one."""
    x = load_head(pointer, offsets, live, K)
    if weight is not None:
        scale = tl.rsqrt(sum_row(x, x) / K + eps)
        w = load_head(weight, pair, live, K)
        x = x[0] * scale * w[0], x[1] * scale * w[1]
    return x


@triton.jit
def norm_backward(dy, pointer, offsets, live, weight, pair, eps, K: tl.constexpr):
    """Gradients through (3): of the head, and of the weight before the sum over tokens."""
    x = load_head(pointer, offsets, live, K)
    w = load_head(weight, pair, live, K)
    scale = tl.rsqrt(sum_row(x, x) / K + eps)
    dnormed = dy[0] * w[0], dy[1] * w[1]
    mean = scale * scale * sum_row(dnormed, x) / K
    dx = scale * (dnormed[0] - x[0] * mean), scale * (dnormed[1] - x[1] * mean)
    return dx, (dy[0] * x[0] * scale, dy[1] * x[1] * scale)


@triton.jit
def rotate(x, cos, sin):
    """RoPE (4) by cos and sin [BT, P]; with -sin its transpose, which is its backward."""
    return x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin


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
def load_own_key(rows, weights, rope, kv, live, pair, cos, sin, eps, K: tl.constexpr):
    """The key after (3) and (4)."""
    k = load_normed(rows.k, kv, live, weights.k_norm, pair, eps, K)
    if rope is not None:
        k = rotate(k, cos, sin)
    return k


@triton.jit
def load_key(rows, weights, rope, first, kv, live, vector, pair, cos, sin, eps, K: tl.constexpr):
    """The key after (6), as (9) and (10) take it."""
    k = load_own_key(rows, weights, rope, kv, live, pair, cos, sin, eps, K)
    if rows.key is not None:
        high = K // 2
        k = (
            residual(k[0], kv, live, rows.key, weights.k0, vector, first[1]),
            residual(k[1], kv + high, live, rows.key, weights.k0, vector + high, first[1]),
        )
    return k


@triton.jit
def store_sum(pointer, offset, x, K: tl.constexpr, P: tl.constexpr):
    """Write the sum of half a head over its tokens to a row of partial sums."""
    pair = tl.arange(0, P)
    tl.store(pointer + offset + pair, tl.sum(x, 0), mask=pair < K // 2)


@triton.jit
def locate(T, H_KV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, P: tl.constexpr):
    """This program's KV head and first token; tokens [BT, 1], pairs and mask [BT, P].

    Pairs are a whole tile because a load of [1, P] would get a layout of its own, and with it a conversion
    through shared memory for each vector of each head.
    """
    start = (tl.program_id(0) // H_KV).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    pair = tl.broadcast_to(tl.arange(0, P)[None, :], (BT, P))
    live = (start + token < T) & (pair < K // 2)
    return tl.program_id(0) % H_KV, start, token, pair, live


@triton.jit
def load_angles(rope, start, token, pair, live, K: tl.constexpr):
    """cos and sin [BT, P]; without a position encoding a pair that is never read."""
    if rope is None:
        angles = 1.0, 0.0
    else:
        at = start * (K // 2) + token * (K // 2) + pair
        angles = load(rope[0], at, live), load(rope[1], at, live)
    return angles
