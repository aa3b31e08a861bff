"""Tiny models in every published form, written as their makers write them and not through our exporter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hrwkv.model.config import LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

RWKV_NAMES = (
    (r"^model\.layers\.", "blocks."),
    (r"\.self_attn\.", ".att."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".ffn.\1."),
    (r"\.input_layernorm\.", ".ln1."),
    (r"\.post_attention_layernorm\.", ".ln2."),
    (r"\.(r|q)_norm\.", ".ln_r."),
    (r"\.k_norm\.", ".ln_k."),
    (r"^model\.norm\.", "ln_out."),
    (r"^model\.embed_tokens\.", "emb."),
    (r"^lm_head\.", "head."),
)
RADLADS_NAMES = (
    (r"\.receptance\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"\.output\.", ".o_proj."),
    (r"\.r_norm\.", ".q_norm."),
)
Weights = dict[str, Tensor]


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def weights_of(model: HybridModel, *, constants: bool) -> Weights:
    """Our names with published shapes; the two constants in every RWKV layer if asked for."""
    weights: Weights = {}
    for name, tensor in model.state_dict().items():
        row = name.rpartition(".")[2] in ("w0", "a0", "v0", "k0")
        weights[name] = tensor.detach().clone().view(1, 1, -1) if row else tensor.detach().clone()
    if constants:
        for layer in model.config.linear_layers:
            mixer, dtype = f"model.layers.{layer}.self_attn", tensor.dtype
            weights[f"{mixer}.layer_architecture"] = torch.tensor(78.0, dtype=dtype)
            weights[f"{mixer}.head_size_record"] = torch.tensor(float(model.config.head_dim), dtype=dtype)
    return weights


def write_pth(model: HybridModel, path: Path, *, constants: bool = True) -> Weights:
    """RWKV-Infer's flat file; a tied head is written out."""
    weights = {renamed(n, RWKV_NAMES): t for n, t in weights_of(model, constants=constants).items()}
    torch.save(weights, path)
    return weights


def write_directory(model: HybridModel, path: Path, *, constants: bool = True, **config: Any) -> Weights:
    """Hugging Face-style safetensors in two shards, whose number in the names is wrong, with an index."""
    path.mkdir()
    weights = weights_of(model, constants=constants)
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_shards(path, weights)
    write_config(model.config, path, **{"rwkv_architecture": model.config.variant, **config})
    return weights


def write_radlads(model: HybridModel, path: Path, **config: Any) -> Weights:
    """RADLADS' names: the teacher's in every layer, and parameters that the balanced form never reads."""
    path.mkdir()
    weights = {}
    linear = tuple(f"model.layers.{layer}.self_attn." for layer in model.config.linear_layers)
    for name, tensor in weights_of(model, constants=False).items():
        weights[renamed(name, RADLADS_NAMES) if name.startswith(linear) else name] = tensor
    width = model.config.num_attention_heads * model.config.head_dim
    for layer in linear:
        weights |= {f"{layer}k_k": torch.ones(1, 1, width), f"{layer}k_a": torch.ones(1, 1, width)}
        weights[f"{layer}r_k"] = torch.zeros(model.config.num_attention_heads, model.config.head_dim)
    write_shards(path, {name: tensor.to(next(model.parameters()).dtype) for name, tensor in weights.items()})
    said = {"balance_state": True, "groupnorm_att": False, "use_tokenshift": False, "use_rope": True}
    write_config(model.config, path, model_type="rwkv7qwen2", **{**said, **config})
    return weights


def write_training(
    model: HybridModel, path: Path, keep: Callable[[str], bool] = lambda name: True
) -> Weights:
    """RWKVInside's checkpoint of what it trained: a file, or a folder of two for a path without suffix."""
    weights = {}
    for name, tensor in weights_of(model, constants=True).items():
        if keep(name):
            name = name.replace(".self_attn.", ".self_attn.student_attn.")
            weights[f"model.{name}" if name.startswith("model.") else name] = tensor
    if path.suffix:
        torch.save(weights, path)
        return weights
    path.mkdir()
    names = list(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({n: weights[n] for n in part}, path / f"pytorch_model-0000{number}-of-00007.bin")
    return weights


def write_shards(path: Path, weights: Weights) -> None:
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-{len(names):05d}.safetensors"
        save_file({n: weights[n].contiguous() for n in part}, path / file)
        index.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_config(config: HybridConfig, path: Path, **values: Any) -> None:
    said = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "nope_in_transformer": not config.attention_rope,
        "nope_in_rwkv": not config.linear_rope,
        "lora_rank_decay": 1,  # wrong, as published ones have been
        **values,
    }
    assert LINEAR in config.layer_types
    (path / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
