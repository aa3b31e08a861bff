"""Necessary operations of a model and of a distillation stage, for a rate to be told as a share of a chip's.

An operation is a multiplication or an addition. Counted are the products with weight matrices, attention (its
causal half) and the recurrence; not the elementwise work, and nothing that a program computes twice (gradient
checkpointing). So the share (MFU, PaLM, arXiv 2204.02311, appendix B) is the same measure for every program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.config import LINEAR, HybridConfig

# Dense operations a second in bf16, as the makers state them.
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "MI300X": 1307e12}


@dataclass(frozen=True)
class Forward:
    """Operations a token of one forward pass by part.

    entry: products of mixers with their normed input. inner: their other products with weights. mixing:
    attention and recurrence, without weights.
    """

    entry: float
    inner: float
    mixing: float
    mlp: float
    head: float

    @property
    def projections(self) -> float:
        """Products of the mixers with their weights."""
        return self.entry + self.inner

    @property
    def blocks(self) -> float:
        """Without the head."""
        return self.projections + self.mixing + self.mlp


def mixer_weights(config: HybridConfig, layer: int) -> tuple[int, int]:
    """Elements of a mixer's matrices: of those that its input meets, and of those inside (W_o included)."""
    size = config.hidden_size
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    entry, inner = size * (width + 2 * kv_width), width * size
    if config.layer_types[layer] != LINEAR:
        return entry, inner
    variant = VARIANTS[config.variant]
    pairs = [(rank, width) for rank in (config.decay_rank, config.iclr_rank, config.gate_rank)]
    if variant.value_residual == "low_rank" or (variant.gates_value and layer > 0):
        pairs.append((config.value_rank, kv_width if variant.value_residual == "gated" else width))
    if variant.key_residual and layer > 0:
        pairs.append((config.key_rank, kv_width))
    return entry + sum(size * rank for rank, _ in pairs), inner + sum(rank * out for rank, out in pairs)


def mixing_operations(config: HybridConfig, layer: int, *, context_length: int) -> float:
    """Operations a token of a layer between its projections, in rows of ``context_length`` tokens."""
    heads, size = config.num_attention_heads, config.head_dim
    if config.layer_types[layer] == LINEAR:
        # hxa079.md (11), (12): two an element for S a, S r and each outer product, one for the decay.
        return 9.0 * heads * size * size
    return 4.0 * heads * size * (context_length + 1) / 2


def forward_operations(config: HybridConfig, *, context_length: int) -> Forward:
    """Operations a token of one forward pass in rows of ``context_length`` tokens."""
    layers = range(config.num_hidden_layers)
    entry, inner = zip(*(mixer_weights(config, layer) for layer in layers), strict=True)
    mlp = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    return Forward(
        entry=2.0 * sum(entry),
        inner=2.0 * sum(inner),
        mixing=sum(mixing_operations(config, layer, context_length=context_length) for layer in layers),
        mlp=2.0 * mlp,
        head=2.0 * config.hidden_size * config.vocab_size,
    )


def stage_operations(
    student: HybridConfig,
    teacher: HybridConfig,
    *,
    stage: int,
    mode: Literal["all", "frozen-mlp"],
    context_length: int,
) -> float:
    """Necessary operations a token of a training step of stage 1, 2 or 3.

    Stage 1: the teacher's blocks, the student's mixers forward, and their backward, which ends at the mixers'
    inputs. Stages 2 and 3: both forwards with both heads, the backward of activations through all of the
    student, twice the forward for what has no weights, and the gradients of those weights that train.
    """
    own = forward_operations(student, context_length=context_length)
    theirs = forward_operations(teacher, context_length=context_length)
    if stage == 1:
        return theirs.blocks + 2 * own.entry + 3 * own.inner + 3 * own.mixing
    forward = theirs.blocks + theirs.head + own.blocks + own.head
    activations = own.projections + own.mlp + own.head + 2 * own.mixing
    weights = own.projections + (own.mlp + own.head if mode == "all" else 0.0)
    return forward + activations + weights


def utilisation(operations: float, *, tokens_per_second: float, peak: float) -> float:
    """Share of ``peak`` operations a second that ``operations`` a token are at a rate (MFU)."""
    return operations * tokens_per_second / peak
