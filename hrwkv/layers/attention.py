"""Grouped-query attention; whether its queries and keys are rotated is the caller's argument.

A kept layer of a hybrid has no position encoding (hxa079.md 15: the RWKV layers carry the order), a
teacher's layer has RoPE. Keys are cached as they are attended to, so a cache never needs a position.
"""

from __future__ import annotations

from torch import Tensor, nn

from hrwkv.kernels.attention import paged_attention, store_kv, varlen_attention
from hrwkv.kernels.rope import rotate
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import RMSNorm, Rope
from hrwkv.layers.projections import Projections


class Attention(Projections):
    """Causal GQA (arXiv 2305.13245); H query heads read H_kv key and value heads of size K."""

    projections = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps)
        self.qk_norm = qk_norm_eps is not None

    def forward(
        self,
        x: Tensor,
        batch: TokenBatch,
        *,
        rope: Rope | None = None,
        k_cache: Tensor | None = None,
        v_cache: Tensor | None = None,
    ) -> Tensor:
        """Attend inside each sequence, cached tokens included.

        x: [T, D], the normed residual stream. rope: cos and sin to rotate q and k by, None for no position
        encoding. k_cache, v_cache: [blocks, block_size, H_kv, K], written in place at ``batch.slot_mapping``.
        Returns y [T, D].
        """
        product = self.projected(x)
        q = product("q_proj").unflatten(-1, (self.num_heads, self.head_dim))
        k = product("k_proj").unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = product("v_proj").unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if k_cache is not None and v_cache is not None:
            assert batch.slot_mapping is not None
            store_kv(k, v, k_cache, v_cache, slot_mapping=batch.slot_mapping)
        # Prompts of which nothing was cached before need no copy of their blocks and no mask.
        is_fresh = batch.contexts == batch.lengths and batch.context_starts is None
        if k_cache is None or v_cache is None or is_fresh:
            o = varlen_attention(q, k, v, cu_seqlens=batch.cu_seqlens, lengths=batch.lengths)
        else:
            assert batch.block_tables is not None
            assert batch.context_lens is not None
            o = paged_attention(
                q,
                k_cache,
                v_cache,
                cu_seqlens=batch.cu_seqlens,
                lengths=batch.lengths,
                block_tables=batch.block_tables,
                context_lens=batch.context_lens,
                contexts=batch.contexts,
                context_starts=batch.context_starts,
            )
        return self.o_proj(o.flatten(1))
