"""What the tensors of a source tell about its model: sizes, ranks, biases, variant; what only a config tells.

Ranks come from shapes, because the numbers in published configs have been wrong. RoPE's base and the norms'
epsilon are in no tensor: whoever guesses them gets fluent nonsense, so they are never guessed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrwkv.convert.formats import Layout
from hrwkv.convert.sources import TensorReader
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.config import LINEAR
from hrwkv.model.shards import CheckpointError

# Rank of the config -> the low-rank product's first factor.
RANK_FACTORS = {
    "decay_rank": "w1",
    "iclr_rank": "a1",
    "value_rank": "v1",
    "key_rank": "k1",
    "gate_rank": "g1",
}


def variant_of(layout: Layout, stated: str | None, reader: TensorReader) -> str:
    """The variant: stated by a config or the caller and agreed to by the tensors, or told by them alone.

    Raises CheckpointError where both disagree, or where the tensors fit several variants and none is stated.
    """
    if layout.form == "radlads":
        found = ["radlads"]
    elif layout.has("k0"):
        found = ["hxa079"]
    elif layout.has("v0"):
        raise CheckpointError(
            f"{reader.path} has a gated value residual and no key residual: that is hxa078, "
            "which is not supported"
        )
    else:
        found = ["hxa07c"] if layout.has("v1") else ["hxa07a"]
    if stated is None:
        if found[0] in ("hxa079", "radlads"):
            return found[0]
        raise CheckpointError(
            f"{reader.path} does not say its variant, and key scales that its tensors do not show differ "
            f"(they would fit {found[0]}): give --variant"
        )
    # hxa07c checkpoints may declare a key residual that they never read.
    if stated not in found and not (stated == "hxa07c" and layout.has("v1")):
        raise CheckpointError(
            f"{reader.path} is said to be {stated}, but its tensors are those of {found[0]}: "
            f"expected one of {', '.join(VARIANTS)}"
        )
    return stated


def sizes_of(layout: Layout, reader: TensorReader, *, variant: str, head_dim: int | None) -> dict[str, Any]:
    """Fields of ``HybridConfig`` that shapes tell; the kinds of all layers must be known.

    head_dim: for sources in which nothing has that shape. Raises CheckpointError if it is needed and missing,
    or if two layers disagree.
    """
    shapes = {ours: reader.shape(theirs) for ours, theirs in layout.tensors.items()}
    for needed in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"):
        if needed not in shapes:
            raise CheckpointError(
                f"{reader.path} lacks {needed}: a part of a model needs its teacher, give --teacher"
            )
    for name, shape in shapes.items():
        is_matrix = name.endswith(".weight") and not name.endswith("norm.weight")
        if is_matrix and (len(shape) != 2 or not all(shape)):
            raise CheckpointError(f"{reader.path}: {name} has shape {list(shape)}, expected a matrix")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    size = _head_dim(layout, reader, shapes, head_dim)
    layer, kind = 0, layout.kinds[0]
    query, key = ("receptance", "key") if kind == LINEAR else ("q_proj", "k_proj")
    heads = shapes[f"model.layers.{layer}.self_attn.{query}.weight"][0] // size
    kv_heads = shapes[f"model.layers.{layer}.self_attn.{key}.weight"][0] // size
    suffixes = {name.split(".", 3)[3] for name in shapes if name.startswith("model.layers.")}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": len(layout.kinds),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "attention_bias": bool(suffixes & {"self_attn.receptance.bias", "self_attn.q_proj.bias"}),
        "attention_output_bias": bool(suffixes & {"self_attn.output.bias", "self_attn.o_proj.bias"}),
        "mlp_bias": "mlp.gate_proj.bias" in suffixes,
        "qk_norm": bool(suffixes & {"self_attn.r_norm.weight", "self_attn.q_norm.weight"}),
        "layer_types": list(layout.kinds),
        "variant": variant,
        **_ranks(layout, shapes, variant, reader),
    }


def _ranks(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], variant: str, reader: TensorReader
) -> dict[str, int]:
    """The low-rank sizes of all RWKV layers; they must agree, a config has one of each."""
    ranks: dict[str, int] = {}
    for rank, factor in RANK_FACTORS.items():
        if rank.removesuffix("_rank") not in VARIANTS[variant].ranks or LINEAR not in layout.kinds:
            continue
        names = [f"model.layers.{number}.self_attn.{factor}" for number in range(len(layout.kinds))]
        found = {number: shapes[name][-1] for number, name in enumerate(names) if name in shapes}
        if not found:
            raise CheckpointError(f"{reader.path} lacks {factor} in every RWKV layer, which {variant} has")
        (first, size), *others = found.items()
        for number, other in others:
            if other != size:
                raise CheckpointError(
                    f"{reader.path}: {factor} has rank {size} in layer {first} and {other} in layer "
                    f"{number}, expected one rank in all layers"
                )
        ranks[rank] = size
    return ranks


def _head_dim(
    layout: Layout, reader: TensorReader, shapes: Mapping[str, tuple[int, ...]], given: int | None
) -> int:
    """The head size: the last axis of r_k or of a q/k norm, else the recorded constant, else as given."""
    for name, shape in shapes.items():
        parameter = name.split(".", 3)[3] if name.startswith("model.layers.") else ""
        is_bonus = parameter == "self_attn.r_k" and len(shape) == 2
        if is_bonus or parameter in ("self_attn.r_norm.weight", "self_attn.q_norm.weight"):
            return shape[-1]
    for name in layout.left:
        if name.endswith("head_size_record"):
            return int(reader.read(name).float().item())
    if given is None:
        raise CheckpointError(f"{reader.path} does not tell the size of its heads: give --head-dim or --like")
    return given
