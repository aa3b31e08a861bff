"""The RWKV-7 mixer of the hybrids: no token shift, no group norm, RoPE on r and k; variants as values.

The equations are numbered in docs/hxa079.md; the arithmetic is that of the released checkpoints, hxa079's
log-log decay in the key scale (10) included. Decay, rates and the state are fp32 whatever the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrwkv.kernels.wkv7 import wkv7, wkv7_decode
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import RMSNorm, Rope, apply_rope, low_rank, repeat_heads

FirstLayer = tuple[Tensor, Tensor]  # v_first [T, H_v, K], k_first [T, H_kv, K], of the stack's first layer
LOW_RANK_VALUE_SCALE = 0.2  # (32)


@dataclass(frozen=True)
class Variant:
    """Where the arithmetic of one mixer differs from another's (hxa079.md, section 7).

    value_residual: "gated" to layer 0's value on the KV heads (5), "gated_repeated" the same on the query
    heads (31), "low_rank" a product of the input alone (32), "none". key_residual: (6). key_scale: "log_log"
    scales the key by w (10), "decay" by the decay itself (33). bonus: (13).
    """

    value_residual: Literal["gated", "gated_repeated", "low_rank", "none"]
    key_residual: bool
    key_scale: Literal["log_log", "decay"]
    bonus: bool

    @property
    def gates_value(self) -> bool:
        """True if the value is mixed with layer 0's."""
        return self.value_residual in ("gated", "gated_repeated")

    @property
    def reads_layer_0(self) -> bool:
        """True if a residual leads to layer 0, which must then be one of these mixers."""
        return self.gates_value or self.key_residual

    @property
    def ranks(self) -> tuple[str, ...]:
        """The fields of ``LowRankSizes`` that this variant has a size for."""
        absent = {"value": self.value_residual == "none", "key": not self.key_residual}
        return tuple(name for name in ("decay", "iclr", "value", "key", "gate") if not absent.get(name))


VARIANTS = {
    "hxa079": Variant(value_residual="gated", key_residual=True, key_scale="log_log", bonus=True),
    "hxa07a": Variant(value_residual="none", key_residual=False, key_scale="log_log", bonus=False),
    "hxa07c": Variant(value_residual="low_rank", key_residual=False, key_scale="decay", bonus=False),
    "radlads": Variant(value_residual="gated_repeated", key_residual=False, key_scale="decay", bonus=False),
}


@dataclass(frozen=True)
class LowRankSizes:
    """Inner sizes of the mixer's low-rank products (hxa079.md 28); None where the variant has no such one."""

    decay: int
    iclr: int
    value: int | None
    key: int | None
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
        variant: Variant = VARIANTS["hxa079"],
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.variant = variant
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
        value_width = kv_width if variant.value_residual == "gated" else width
        if variant.gates_value:
            self.v0 = zeros(value_width)
        if variant.value_residual != "none":
            assert ranks.value is not None
            self.v1, self.v2 = zeros(hidden_size, ranks.value), zeros(ranks.value, value_width)
        if variant.key_residual:
            assert ranks.key is not None
            self.k0, self.k1, self.k2 = (
                zeros(kv_width),
                zeros(hidden_size, ranks.key),
                zeros(ranks.key, kv_width),
            )
        self.g1, self.g2 = zeros(hidden_size, ranks.gate), zeros(ranks.gate, width)
        if variant.bonus:
            self.r_k = zeros(num_heads, head_dim)

    def forward(
        self,
        x: Tensor,
        batch: TokenBatch,
        *,
        rope: Rope | None = None,
        first: FirstLayer | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, FirstLayer | None]:
        """Mix the packed tokens along their sequences.

        x: [T, D], the normed residual stream. rope: cos and sin to rotate r and k by, None for no position
        encoding. first: the first layer's value and key, None in that layer; gradients flow through them.
        state: pool [slots, H, K, K] fp32, read at ``batch.state_slots`` and written in place; None starts
        every sequence from zeros. Returns y [T, D] and ``first``, which stays None if nothing reads it.
        """
        r, k, v = self._project(x, rope)
        k, v, first = self._residuals(x, k, v, first)
        o = self._recur(x, r, k, v, batch, state)
        gate = torch.sigmoid(x @ self.g1) @ self.g2  # [T, C] (14)
        return self.output(o.flatten(1) * gate), first

    def _project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """r [T, H, K] and k, v [T, H_kv, K], normed and rotated (2 to 4)."""
        r = self.receptance(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.key(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.value(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.qk_norm:
            r, k = self.r_norm(r), self.k_norm(k)
        if rope is not None:
            r, k = apply_rope(r, rope), apply_rope(k, rope)
        return r, k, v

    def _residuals(
        self, x: Tensor, k: Tensor, v: Tensor, first: FirstLayer | None
    ) -> tuple[Tensor, Tensor, FirstLayer | None]:
        """k [T, H_kv, K] and v, by then [T, H_kv, K] or [T, H, K], with their residuals (5, 6, 31, 32)."""
        if self.variant.value_residual in ("gated_repeated", "low_rank"):
            v = self._repeat(v)
        if self.variant.value_residual == "low_rank":
            v = v + LOW_RANK_VALUE_SCALE * low_rank(x, self.v1, self.v2).view_as(v)  # (32)
        if not self.variant.reads_layer_0:
            return k, v, first
        if first is None:
            return k, v, (v, k)
        v_first, k_first = first
        if self.variant.gates_value:
            v = _blend(v, v_first, self.v0 + low_rank(x, self.v1, self.v2))  # (5, 31)
        if self.variant.key_residual:
            k = _blend(k, k_first, self.k0 + low_rank(x, self.k1, self.k2))  # (6)
        return k, v, first

    def _repeat(self, x: Tensor) -> Tensor:
        """[T, H_kv, K] or [T, H, K] -> [T, H, K]."""
        return repeat_heads(x, self.num_heads // x.shape[1])

    def _recur(
        self, x: Tensor, r: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, state: Tensor | None
    ) -> Tensor:
        """Rates, delta rule, scale and bonus (7 to 13, 33); returns o [T, H, K] in x's dtype."""
        heads = (self.num_heads, self.head_dim)
        a = torch.sigmoid(self.a0 + low_rank(x, self.a1, self.a2)).float().unflatten(-1, heads)  # (7)
        decay_input = self.w0.float() + (torch.tanh(x @ self.w1) @ self.w2).float()
        w = (-F.softplus(-decay_input) - 0.5).unflatten(-1, heads)  # log(-log(decay)), <= -0.5 (8)
        log_decay = -w.exp()
        kk = self._repeat(F.normalize(k.float(), dim=-1, eps=1e-12))  # (9)
        k, v = self._repeat(k), self._repeat(v)
        scale = w if self.variant.key_scale == "log_log" else log_decay.exp()
        k = (k * (1 - scale + a)).to(v.dtype)  # (10, 33)
        inputs = (r, log_decay, k, v, -kk, kk * a)
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
        o = o * self.head_dim**-0.5
        if self.variant.bonus:
            o = o + (r * k * self.r_k).sum(-1, keepdim=True) * v  # (13), not scaled
        return o


def _blend(own: Tensor, first: Tensor, logits: Tensor) -> Tensor:
    """own [T, heads, K] moved towards ``first`` by sigmoid(logits [T, heads * K])."""
    return own + (first - own) * torch.sigmoid(logits).view_as(own)
