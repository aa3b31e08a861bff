"""Tiny random models and batches for tests: no downloads, odd sizes, every weight random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
RANKS = {"decay_rank": 5, "iclr_rank": 4, "value_rank": 3, "key_rank": 3, "gate_rank": 6}

# Readable id -> model_type and the fields in which the case differs.
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
}
# With max_position_embeddings 64 for extended types; dynamic extends from its limit on.
ROPE_CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0},
        "max_position_embeddings": 16,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def randomise(model: nn.Module, seed: int) -> None:
    """Move every parameter by noise, so that no bias is 0, no norm is 1 and no factor is left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def hf_teacher(
    path: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    shard: str = "12KB",
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A random Transformers model of the family, saved to ``path`` in several shards, in evaluation mode."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **(changes or {})})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return model.eval()


def hf_logits(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits [T, V] of packed ids, each sequence by itself."""
    with torch.no_grad():
        return torch.cat([model(part.unsqueeze(0)).logits[0] for part in ids.split(list(lengths))])


def ranks_of(variant: str) -> dict[str, int]:
    """Those of ``RANKS`` that the variant has."""
    return {f"{name}_rank": RANKS[f"{name}_rank"] for name in VARIANTS[variant].ranks}


def hybrid_config(attention_layers: Sequence[int] = (2,), **changes: Any) -> HybridConfig:
    """A tiny hybrid; attention_layers without layer 0, or all layers for a teacher."""
    count = changes.get("num_hidden_layers", SIZES["num_hidden_layers"])
    kinds = [FULL if layer in attention_layers else LINEAR for layer in range(count)]
    variant = changes.get("variant", "hxa079")
    ranks = ranks_of(variant) if LINEAR in kinds and variant in VARIANTS else {}
    values = {**SIZES, **ranks, "layer_types": kinds, "attention_rope": LINEAR not in kinds, **changes}
    return HybridConfig(**values)


def hybrid_model(attention_layers: Sequence[int] = (2,), *, seed: int = 0, **changes: Any) -> HybridModel:
    """A random tiny hybrid in evaluation mode, fp32."""
    torch.manual_seed(seed)
    model = HybridModel(hybrid_config(attention_layers, **changes))
    randomise(model, seed)
    return model.eval()


def random_ids(count: int, *, seed: int = 0) -> Tensor:
    """[count] token ids."""
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def logits_of(model: HybridModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits [T, V] of packed ids in one forward without a cache."""
    with torch.no_grad():
        return model.compute_logits(model(ids, TokenBatch.from_lengths(lengths)))


def cached_batch(
    pieces: Sequence[range], *, slots: Sequence[int], blocks: Sequence[Sequence[int]], block_size: int
) -> TokenBatch:
    """A batch that continues sequences in a cache.

    pieces: each sequence's positions that come now. slots: its place in the state pool. blocks: its KV blocks
    in order, enough for the last position; tables are padded with block 0.
    """
    whole = TokenBatch.from_lengths([len(piece) for piece in pieces])
    width = max(len(row) for row in blocks)
    places = [
        row[position // block_size] * block_size + position % block_size
        for piece, row in zip(pieces, blocks, strict=True)
        for position in piece
    ]
    return TokenBatch(
        positions=torch.tensor([position for piece in pieces for position in piece]),
        cu_seqlens=whole.cu_seqlens,
        lengths=whole.lengths,
        state_slots=torch.tensor(slots),
        block_tables=torch.tensor([[*row, *[0] * (width - len(row))] for row in blocks]),
        slot_mapping=torch.tensor(places),
        context_lens=torch.tensor([piece.stop for piece in pieces]),
    )
