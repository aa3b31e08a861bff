"""The mixer's work by elements, before and after the recurrence, as it is defined: plain torch.

This is the reference that every other form is tested against. It computes in fp32, or in fp64 for fp64 rows,
and rounds once, when a result is stored. The types of its arguments live here, since every form speaks them.
It leaves out every check of its arguments: ``hrwkv.kernels.mix`` holds those.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos and sin, each [T, K / 2] fp32
FirstLayer = tuple[Tensor, Tensor]  # v_first [T, H_v, K], k_first [T, H_kv, K], of the stack's first layer
LOW_RANK_VALUE_SCALE = 0.2  # (32)


class Rows(NamedTuple):
    """What a layer's matrix products give for T packed tokens; all of one floating dtype.

    r: [T, H, K] and k, v: [T, H_kv, K] (2). decay: [T, H, K], tanh(x w1) w2, without w0 (8). iclr: [T, H, K],
    (x a1) a2, without a0 (7). gate: [T, H, K], sigmoid(x g1) g2 (14). value: [T, H_v, K], (x v1) v2, without
    v0, with H_v = H_kv for "gated" and H for "gated_repeated" and "low_rank"; key: [T, H_kv, K], (x k1) k2,
    without k0; both None where the form, or the first layer, does not read them.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    iclr: Tensor
    gate: Tensor
    value: Tensor | None
    key: Tensor | None


class Weights(NamedTuple):
    """The mixer's own vectors, flat [heads * K] or [heads, K], and the weights [K] of the q/k norms.

    None says that the variant has no such term: without r_k no bonus (13), without k0 no key residual (6),
    without r_norm and k_norm no q/k norm (3).
    """

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k0: Tensor | None
    r_k: Tensor | None
    r_norm: Tensor | None
    k_norm: Tensor | None


class Form(NamedTuple):
    """The choices that no tensor tells (hxa079.md, section 7); norm_eps is the epsilon of (3)."""

    value_residual: Literal["gated", "gated_repeated", "low_rank", "none"]
    key_scale: Literal["log_log", "decay"]
    norm_eps: float


class Mixed(NamedTuple):
    """What the recurrence takes: fp32 log_decay, everything else in the dtype of the rows.

    r, k, b: [T, H, K]; log_decay: [T, H, K] fp32; v: [T, H_v, K]; a = -kk: [T, H_kv, K], not repeated.
    """

    r: Tensor
    log_decay: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def mix(
    rows: Rows, weights: Weights, *, form: Form, rope: Rope | None, first: FirstLayer | None
) -> tuple[Mixed, Tensor | None, FirstLayer | None]:
    """Make what the recurrence takes from the rows; the contract is ``hrwkv.kernels.mix.mix``'s."""
    stored = rows.r.dtype
    dtype = torch.promote_types(stored, torch.float32)
    r, k, v, decay, iclr = (x.to(dtype) for x in (rows.r, rows.k, rows.v, rows.decay, rows.iclr))
    if weights.r_norm is not None and weights.k_norm is not None:
        r = _rms_norm(r, weights.r_norm, eps=form.norm_eps)
        k = _rms_norm(k, weights.k_norm, eps=form.norm_eps)
    if rope is not None:
        r, k = _rotate(r, rope), _rotate(k, rope)
    if form.value_residual in ("gated_repeated", "low_rank"):
        v = repeat_heads(v, r.shape[1])
    if form.value_residual == "low_rank" and rows.value is not None:
        v = v + LOW_RANK_VALUE_SCALE * rows.value.to(dtype)  # (32)
    gates_value = form.value_residual in ("gated", "gated_repeated")
    if gates_value or weights.k0 is not None:
        if first is None:
            first = v.to(stored), k.to(stored)
        else:
            v_first, k_first = first
            if gates_value and rows.value is not None and weights.v0 is not None:
                v = _blend(v, v_first, logits=_add(weights.v0, rows.value, dtype))  # (5, 31)
            if weights.k0 is not None and rows.key is not None:
                k = _blend(k, k_first, logits=_add(weights.k0, rows.key, dtype))  # (6)
    iclr = torch.sigmoid(_add(weights.a0, iclr, dtype))  # (7)
    w = -F.softplus(-_add(weights.w0, decay, dtype)) - 0.5  # (8)
    log_decay = -w.exp()
    kk = F.normalize(k, dim=-1, eps=1e-12)  # (9)
    scale = w if form.key_scale == "log_log" else log_decay.exp()
    k = repeat_heads(k, r.shape[1]) * (1 - scale + iclr)  # (10, 33)
    b = repeat_heads(kk, r.shape[1]) * iclr
    r_k = weights.r_k
    bonus = None if r_k is None else (r * k * r_k.to(dtype).view(r.shape[1:])).sum(-1)
    r, k, v, a, b = (x.to(stored) for x in (r, k, v, -kk, b))
    return Mixed(r=r, log_decay=log_decay, k=k, v=v, a=a, b=b), bonus, first


def finish(o: Tensor, v: Tensor, gate: Tensor, *, bonus: Tensor | None) -> Tensor:
    """Scale, bonus and gate (12 to 14); the contract is ``hrwkv.kernels.mix.finish``'s."""
    dtype = torch.promote_types(o.dtype, torch.float32)
    y = o.to(dtype) * o.shape[-1] ** -0.5  # (12)
    if bonus is not None:
        y = y + bonus.to(dtype).unsqueeze(-1) * repeat_heads(v.to(dtype), o.shape[1])  # (13), not scaled
    return (y * gate.to(dtype)).to(o.dtype)  # (14) up to W_o


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[T, H_kv, K] -> [T, heads, K]: query head h reads KV head ``h // (heads / H_kv)``."""
    groups = heads // x.shape[1]
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _add(bias: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """bias, flat or [heads, K], added to every row [T, heads, K] in ``dtype``."""
    return bias.to(dtype).view(rows.shape[1:]) + rows.to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """(1) over each head of x [T, heads, K]; weight [K]."""
    return F.rms_norm(x, weight.shape, None, eps) * weight.to(x.dtype)


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE in the half-split form (4) of x [T, heads, K]."""
    cos, sin = (table.to(x.dtype).unsqueeze(1) for table in rope)  # [T, 1, K / 2]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _blend(own: Tensor, first: Tensor, *, logits: Tensor) -> Tensor:
    """own [T, heads, K] moved towards ``first`` by sigmoid(logits), all of one shape (5, 6, 31)."""
    return own + (first.to(own.dtype) - own) * torch.sigmoid(logits)
