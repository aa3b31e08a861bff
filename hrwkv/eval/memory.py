"""Parameters, state bytes and KV bytes per token, counted from configs alone.

Counts come from the module tree on the meta device, so they are those of the very model that loads. Left out:
activations, the page size of an engine's KV cache, the memory of a framework.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hrwkv.model.cache import kv_bytes_per_token, state_bytes
from hrwkv.model.config import LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel


@dataclass(frozen=True)
class Memory:
    """What one model needs.

    parameters: numbers of the weights; by_kind: the same split into embedding, head, rwkv, attention, mlp,
    norm (a tied head counts as embedding). state_bytes: per sequence, whatever its length.
    kv_bytes_per_token: per token of each sequence.
    """

    parameters: int
    by_kind: dict[str, int]
    rwkv_layers: int
    attention_layers: int
    state_bytes: int
    kv_bytes_per_token: int

    def bytes_at(self, context: int) -> int:
        """Memory of one sequence of ``context`` tokens, in bytes."""
        return self.state_bytes + self.kv_bytes_per_token * context


def memory_of(config: HybridConfig, *, kv_bytes: int = 2) -> Memory:
    """Count one config's memory; ``kv_bytes`` is the size of a key or value element (2: bf16)."""
    by_kind = _parameters_by_kind(config)
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    linear, full = len(config.linear_layers), len(config.full_layers)
    return Memory(
        parameters=sum(by_kind.values()),
        by_kind=by_kind,
        rwkv_layers=linear,
        attention_layers=full,
        state_bytes=state_bytes(linear, num_heads=config.num_attention_heads, head_dim=config.head_dim),
        kv_bytes_per_token=kv_bytes_per_token(
            full, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim, itemsize=kv_bytes
        ),
    )


def break_even_context(student: Memory, teacher: Memory) -> int | None:
    """Length from which on a sequence takes less memory in the student; None if it never does."""
    saved = teacher.kv_bytes_per_token - student.kv_bytes_per_token
    extra = student.state_bytes - teacher.state_bytes
    if saved > 0:
        return max(extra // saved + 1, 0)
    return 0 if saved == 0 and extra < 0 else None


def _parameters_by_kind(config: HybridConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = HybridModel(config)
    counts = dict.fromkeys(("embedding", "head", "rwkv", "attention", "mlp", "norm"), 0)
    for name, parameter in model.named_parameters():
        counts[_kind(name, config)] += parameter.numel()
    return counts


def _kind(name: str, config: HybridConfig) -> str:
    """The kind of a parameter, from its name in the file."""
    if name.startswith("lm_head"):
        return "head"
    if name.startswith("model.embed_tokens"):
        return "embedding"
    if ".self_attn." in name:
        layer = int(name.split(".")[2])
        assert config.layer_types is not None
        return "rwkv" if config.layer_types[layer] == LINEAR else "attention"
    return "mlp" if ".mlp." in name else "norm"
