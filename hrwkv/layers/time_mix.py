"""The RWKV-7 mixer of hxa079: no token shift, no group norm, RoPE on r and k, residuals to layer 0.

The equations are numbered in docs/hxa079.md; the arithmetic is that of the released checkpoints, the
log-log decay in the key scale (10) included. Decay, rates and the state are fp32 whatever the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrwkv.kernels.wkv7 import wkv7, wkv7_decode
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import RMSNorm, Rope, apply_rope, low_rank, repeat_heads

FirstLayer = tuple[Tensor, Tensor]  # v_first, k_first: [T, H_kv, K], of the stack's first layer


@dataclass(frozen=True)
class LowRankSizes:
    """Inner sizes of the mixer's low-rank products (hxa079.md 28)."""

    decay: int
    iclr: int
    value: int
    key: int
    gate: int


class TimeMix(nn.Module):
    """One RWKV-7 mixer; D hidden size, H heads, H_kv KV heads, K head size, C = H * K."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        ranks: LowRankSizes,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.receptance = nn.Linear(hidden_size, width, bias=bias)
        self.key = nn.Linear(hidden_size, kv_width, bias=bias)
        self.value = nn.Linear(hidden_size, kv_width, bias=bias)
        self.output = nn.Linear(width, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.r_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)
        self.qk_norm = qk_norm_eps is not None

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.w0, self.w1, self.w2 = zeros(width), zeros(hidden_size, ranks.decay), zeros(ranks.decay, width)
        self.a0, self.a1, self.a2 = zeros(width), zeros(hidden_size, ranks.iclr), zeros(ranks.iclr, width)
        # The first layer's residual gates are never read; they exist because the published files hold them.
        self.v0, self.v1, self.v2 = (
            zeros(kv_width),
            zeros(hidden_size, ranks.value),
            zeros(ranks.value, kv_width),
        )
        self.k0, self.k1, self.k2 = zeros(kv_width), zeros(hidden_size, ranks.key), zeros(ranks.key, kv_width)
        self.g1, self.g2 = zeros(hidden_size, ranks.gate), zeros(ranks.gate, width)
        self.r_k = zeros(num_heads, head_dim)

    def forward(
        self,
        x: Tensor,
        batch: TokenBatch,
        *,
        rope: Rope,
        first: FirstLayer | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, FirstLayer]:
        """Mix the packed tokens along their sequences.

        x: [T, D], the normed residual stream. first: the first layer's value and key, None in that layer;
        gradients flow through them. state: pool [slots, H, K, K] fp32, read at ``batch.state_slots`` and
        written in place; None starts every sequence from zeros. Returns y [T, D] and ``first``.
        """
        r, k, v = self._project(x, rope)
        if first is None:
            first = v, k
        else:
            v = v + (first[0] - v) * torch.sigmoid(self.v0 + low_rank(x, self.v1, self.v2)).view_as(v)  # (5)
            k = k + (first[1] - k) * torch.sigmoid(self.k0 + low_rank(x, self.k1, self.k2)).view_as(k)  # (6)
        o = self._recur(x, r, k, v, batch, state)
        gate = torch.sigmoid(x @ self.g1) @ self.g2  # [T, C] (14)
        return self.output(o.flatten(1) * gate), first

    def _project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """r [T, H, K] and k, v [T, H_kv, K], normed and rotated (2 to 4)."""
        r = self.receptance(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.key(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.value(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.qk_norm:
            r, k = self.r_norm(r), self.k_norm(k)
        return apply_rope(r, rope), apply_rope(k, rope), v

    def _recur(
        self, x: Tensor, r: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, state: Tensor | None
    ) -> Tensor:
        """Rates, delta rule, scale and bonus (7 to 13); returns o [T, H, K] in x's dtype."""
        heads = (self.num_heads, self.head_dim)
        groups = self.num_heads // self.num_kv_heads
        a = torch.sigmoid(self.a0 + low_rank(x, self.a1, self.a2)).float().unflatten(-1, heads)  # (7)
        decay_input = self.w0.float() + (torch.tanh(x @ self.w1) @ self.w2).float()
        w = (-F.softplus(-decay_input) - 0.5).unflatten(-1, heads)  # log(-log(decay)), <= -0.5 (8)
        kk = repeat_heads(F.normalize(k.float(), dim=-1, eps=1e-12), groups)  # (9)
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
        k = (k * (1 - w + a)).to(v.dtype)  # (10)
        inputs = (r, -w.exp(), k, v, -kk, kk * a)
        if state is None:
            o, _ = wkv7(*inputs, cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
        elif batch.is_decode:
            assert batch.state_slots is not None
            o = wkv7_decode(*inputs, state=state, state_slots=batch.state_slots)
        else:
            o, final = wkv7(
                *inputs,
                cu_seqlens=batch.cu_seqlens,
                lengths=batch.lengths,
                initial_state=state[batch.state_slots],
            )
            state[batch.state_slots] = final
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # (13), not scaled
        return o * self.head_dim**-0.5 + bonus
