"""The RWKV-7 mixer of the hybrids: no token shift, no group norm, RoPE on r and k; variants as values.

The layer holds the parameters and their matrix products. What lies between the projections and W_o is the
kernels' work: mix, wkv7 and finish, or all of it at once in a decode step. Equations: docs/hxa079.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hrwkv.kernels.low_rank import Activation, expand
from hrwkv.kernels.mix import FirstLayer, Form, Mixed, Rows, Weights, finish, mix
from hrwkv.kernels.wkv7 import mixer_decode, wkv7, wkv7_decode
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import RMSNorm, Rope
from hrwkv.layers.projections import Projections

__all__ = ["VARIANTS", "FirstLayer", "LowRankSizes", "TimeMix", "Variant"]


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


class TimeMix(Projections):
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
        self.head_dim = head_dim
        self.variant = variant
        self.form = Form(variant.value_residual, variant.key_scale, norm_eps=qk_norm_eps or 0.0)
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
        names = ("receptance", "key", "value", "w1", "a1", "v1", "k1", "g1")
        self.projections = tuple(name for name in names if hasattr(self, name))

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
        state: pool [slots, H, K, K], read at ``batch.state_slots`` and written in place, no gradient flows
        through it; None starts every sequence from zeros. Returns y [T, D] and ``first``, which stays None
        if nothing reads it.
        """
        rows, weights = self._project(x, in_first=first is None), self._weights()
        if state is not None and batch.is_decode and not torch.is_grad_enabled():
            assert batch.state_slots is not None
            y, first = mixer_decode(
                rows,
                weights,
                form=self.form,
                rope=rope,
                first=first,
                state=state,
                state_slots=batch.state_slots,
            )
        else:
            mixed, bonus, first = mix(rows, weights, form=self.form, rope=rope, first=first)
            o = _recur(mixed, batch, state)
            y = finish(o, mixed.v, rows.gate, bonus=bonus)
        return self.output(y.flatten(1)), first

    def _project(self, x: Tensor, *, in_first: bool) -> Rows:
        """The products of x that this layer reads, by heads (2, 5 to 8, 14, 31, 32)."""
        gates_value = self.variant.gates_value and not in_first
        reads_value = gates_value or self.variant.value_residual == "low_rank"
        reads_key = self.variant.key_residual and not in_first

        product = self.projected(x)

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (-1, self.head_dim))

        r, k, v = (heads(product(name)) for name in ("receptance", "key", "value"))
        activations: dict[str, Activation] = {"w": "tanh", "a": "none", "g": "sigmoid"}
        activations |= {"v": "none"} if reads_value else {}
        activations |= {"k": "none"} if reads_key else {}
        expanded = expand(
            [product(f"{name}1") for name in activations],
            [getattr(self, f"{name}2") for name in activations],
            activations=list(activations.values()),
        )
        low_rank = dict(zip(activations, map(heads, expanded), strict=True))
        return Rows(
            r=r,
            k=k,
            v=v,
            decay=low_rank["w"],
            iclr=low_rank["a"],
            gate=low_rank["g"],
            value=low_rank.get("v"),
            key=low_rank.get("k"),
        )

    def _weights(self) -> Weights:
        """The vectors that the variant has."""
        return Weights(
            w0=self.w0,
            a0=self.a0,
            v0=self.v0 if self.variant.gates_value else None,
            k0=self.k0 if self.variant.key_residual else None,
            r_k=self.r_k if self.variant.bonus else None,
            r_norm=self.r_norm.weight if self.qk_norm else None,
            k_norm=self.k_norm.weight if self.qk_norm else None,
        )


def _recur(mixed: Mixed, batch: TokenBatch, state: Tensor | None) -> Tensor:
    """The recurrence (11) over whole sequences, or over pieces that go on from the pool: o [T, H, K]."""
    if state is None:
        o, _ = wkv7(*mixed, cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
        return o
    assert batch.state_slots is not None
    # Next tokens beside prompts: a step in place moves a state twice, a chunk with its copies six times.
    num = 0 if torch.is_grad_enabled() else batch.num_single
    slots = batch.state_slots[num:]
    first = [x[:num] for x in mixed]
    stepped = wkv7_decode(*first, state=state, state_slots=batch.state_slots[:num]) if num else None
    if stepped is not None and num == len(mixed.r):
        return stepped
    o, after = wkv7(
        *(x[num:] for x in mixed),
        cu_seqlens=batch.cu_seqlens[num:] - num,
        lengths=batch.lengths[num:],
        initial_state=state[slots],
    )
    # A pool with a graph would keep every earlier piece alive.
    state[slots] = after.detach().to(state.dtype)
    return o if stepped is None else torch.cat([stepped, o])
