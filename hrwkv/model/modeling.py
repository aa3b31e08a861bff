"""The one forward: packed tokens in, hidden states out, for training, prefill, decode and Transformers.

What differs between those uses is a ``TokenBatch`` and whether a ``HybridCache`` is there. Parameter names
are the checkpoint's. Logits are apart: serving wants a few of them, training wants them in chunks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrwkv.layers.attention import Attention
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import RMSNorm, Rope, SwiGLU
from hrwkv.layers.linear import FrozenSwiGLU
from hrwkv.layers.projections import Projections
from hrwkv.layers.time_mix import VARIANTS, FirstLayer, LowRankSizes, TimeMix
from hrwkv.model.cache import HybridCache
from hrwkv.model.config import LINEAR, HybridConfig
from hrwkv.model.rope import RotaryTable

# What gradient checkpointing keeps of a block besides its input, from the least memory to the most.
Keep = Literal["nothing", "stream", "mlp", "mixer"]


class Block(nn.Module):
    """Norm, mixer, norm, MLP, with the residual stream around both (hxa079.md 17)."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer] == LINEAR
        self.rotates = config.linear_rope if self.is_linear else config.attention_rope
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = build_mixer(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | FrozenSwiGLU = SwiGLU(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias
        )

    def forward(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        rope: Rope,
        first: FirstLayer | None = None,
        memory: tuple[Tensor, ...] = (),
        keep: Keep | None = None,
        delta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, FirstLayer | None]:
        """hidden, delta [T, D] -> the same of the next block, and the first layer's value and key.

        The stream is hidden + delta: a half's result is added where the next norm reads the sum anyway.
        delta None: nothing is left to add. The first layer's are None where no residual reads them. keep:
        which half is not computed again in the backward pass, ``mixer`` or ``mlp``; ``stream``: none, None:
        both.
        """
        if keep in ("stream", "mlp"):
            # Non-reentrant: the reentrant form silently drops gradients around frozen parameters.
            hidden, mixed, first = checkpoint(
                self._normed_mix, hidden, delta, batch, rope, first, memory, use_reentrant=False
            )
        else:
            hidden, mixed, first = self._normed_mix(hidden, delta, batch, rope, first, memory)
        return *self._normed_mlp(hidden, mixed, recompute=keep in ("stream", "mixer")), first

    def _normed_mix(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        batch: TokenBatch,
        rope: Rope,
        first: FirstLayer | None,
        memory: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, FirstLayer | None]:
        hidden, x = add_and_norm(hidden, delta, norm=self.input_layernorm)
        return hidden, *self.mix(x, batch, rope, first, memory)

    def _normed_mlp(self, hidden: Tensor, mixed: Tensor, *, recompute: bool) -> tuple[Tensor, Tensor]:
        hidden, x = add_and_norm(hidden, mixed, norm=self.post_attention_layernorm)
        return hidden, self.mlp(x, recompute=recompute)

    def mix(
        self,
        x: Tensor,
        batch: TokenBatch,
        rope: Rope,
        first: FirstLayer | None = None,
        memory: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, FirstLayer | None]:
        """The mixer alone on normed x [T, D]; ``memory`` is this layer's part of a cache."""
        own_rope = rope if self.rotates else None
        if self.is_linear:
            state = memory[0] if memory else None
            return self.self_attn(x, batch, rope=own_rope, first=first, state=state)
        k_cache, v_cache = memory or (None, None)
        return self.self_attn(x, batch, rope=own_rope, k_cache=k_cache, v_cache=v_cache), first

    def feed_forward(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The second half of the block, with the residuals of both: hidden, mixed [T, D] -> hidden [T, D]."""
        hidden, y = self._normed_mlp(hidden, mixed, recompute=False)
        return hidden + y


def add_and_norm(hidden: Tensor, delta: Tensor | None, *, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """hidden + delta, where there is a delta, and its norm."""
    return (hidden, norm(hidden)) if delta is None else norm(hidden, delta)


def build_mixer(config: HybridConfig, layer: int) -> TimeMix | Attention:
    """The mixer that ``layer_types`` names for this layer."""
    qk_norm_eps = config.rms_norm_eps if config.qk_norm else None
    if config.layer_types[layer] != LINEAR:
        return Attention(
            config.hidden_size,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm_eps=qk_norm_eps,
        )
    ranks = LowRankSizes(
        decay=config.decay_rank,
        iclr=config.iclr_rank,
        value=config.value_rank,
        key=config.key_rank,
        gate=config.gate_rank,
    )
    return TimeMix(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ranks=ranks,
        variant=VARIANTS[config.variant],
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
        qk_norm_eps=qk_norm_eps,
    )


class Backbone(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = RotaryTable(config)
        self.gradient_checkpointing = False
        self.keep: Keep = "nothing"  # read with gradient_checkpointing only

    def forward(
        self,
        tokens: Tensor,
        batch: TokenBatch,
        cache: HybridCache | None = None,
        stream: list[Tensor] | None = None,
    ) -> Tensor:
        """tokens: [T] int64 ids, or [T, D] embeddings. Returns hidden [T, D] after the final norm.

        stream: receives the residual stream [T, D] after each block, for those who align or inspect it.
        """
        hidden = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        rope = self.rope(batch)
        memory = cache.by_layer(self.config) if cache is not None else [()] * len(self.layers)
        checkpoints = self.gradient_checkpointing and self.training
        delta, first = None, None
        for block, own in zip(self.layers, memory, strict=True):
            if checkpoints and self.keep == "nothing":
                hidden, delta, first = checkpoint(block, hidden, batch, rope, first, own, use_reentrant=False)
            else:
                keep = self.keep if checkpoints else None
                hidden, delta, first = block(hidden, batch, rope, first, own, keep, delta)
            if checkpoints or stream is not None:  # a checkpointed block would keep both of its inputs
                hidden, delta = hidden + delta, None
            if stream is not None:
                stream.append(hidden)
        return add_and_norm(hidden, delta, norm=self.norm)[1]


class HybridModel(nn.Module):
    """A hybrid, or with attention layers only its teacher."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding where the config says so; needed again after weights are assigned."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def fuse_projections(self) -> None:
        """Make the products that meet one input one product, for inference (layers/projections.py)."""
        for module in self.modules():
            if isinstance(module, Projections):
                module.fuse_projections()
                if self.lm_head.weight.is_cuda:  # the old weights' memory is in pieces too small for the next
                    torch.cuda.empty_cache()

    def forward(
        self,
        tokens: Tensor,
        batch: TokenBatch,
        cache: HybridCache | None = None,
        stream: list[Tensor] | None = None,
    ) -> Tensor:
        """tokens: [T] int64 packed ids -> hidden [T, D]. ``cache`` is read and written in place."""
        return self.model(tokens, batch, cache, stream)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V] (hxa079.md 17)."""
        return self.lm_head(hidden)
