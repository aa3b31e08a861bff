"""Teacher families: what of a Transformers ``config.json`` we carry, and what is refused by its name.

All supported families share one block (RMSNorm, GQA with RoPE, SwiGLU) and its parameter names; they differ
in biases and in q/k norm. A family is a row here. What a row does not carry must never be ignored: a model
that runs without its sliding window gives other text, silently.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from hrwkv.model.config import FULL, HybridConfig

Check = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Family:
    """One teacher family; each rule reads the teacher's ``config.json``.

    attention_bias, output_bias, mlp_bias: whether q/k/v, o and the MLP have biases. qk_norm: whether
    the heads are normed. dropped: tensor names (suffixes) that carry nothing and may be left behind.
    """

    attention_bias: Check
    output_bias: Check
    mlp_bias: Check
    sliding_window: Check
    qk_norm: bool = False
    dropped: tuple[str, ...] = ("rotary_emb.inv_freq",)


def _never(config: dict[str, Any]) -> bool:
    return False


def _always(config: dict[str, Any]) -> bool:
    return True


def _flag(name: str, default: bool = False) -> Check:
    return lambda config: bool(config.get(name, default))


def _window_layers(config: dict[str, Any]) -> bool:
    """Qwen's rule: Transformers tells from the switch and the layer's number which layers have a window."""
    return "sliding_attention" in (config.get("layer_types") or [])


FAMILIES: dict[str, Family] = {
    "llama": Family(_flag("attention_bias"), _flag("attention_bias"), _flag("mlp_bias"), _never),
    "mistral": Family(_never, _never, _never, lambda config: config.get("sliding_window") is not None),
    "qwen2": Family(_always, _never, _never, _window_layers),
    "qwen3": Family(_flag("attention_bias"), _flag("attention_bias"), _never, _window_layers, qk_norm=True),
}

# Features that change the forward and that no row carries: key in config.json -> its name in the message.
REFUSED: dict[str, str] = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "attn_logit_softcapping": "attention soft-capping",
    "final_logit_softcapping": "logit soft-capping",
    "attention_sinks": "attention sinks",
    "is_encoder_decoder": "an encoder",
    "vision_config": "an image encoder",
    "audio_config": "an audio encoder",
    "quantization_config": "quantised weights (save the model in bf16 first)",
}

CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def family_of(config: dict[str, Any]) -> Family:
    """The family's row. Raises ValueError for an unknown ``model_type``, naming those that are known."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the teacher's family is {model_type!r}, expected one of: {known}")
    return FAMILIES[model_type]


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What the file leaves out, filled as Transformers fills it, older forms of RoPE included."""
    from huggingface_hub.errors import StrictDataclassError  # comes with Transformers

    try:
        # A copy, because Transformers rewrites the nested dictionaries of its argument.
        return AutoConfig.for_model(**deepcopy(config)).to_dict()
    except (StrictDataclassError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the teacher's config.json is not a valid {config['model_type']} config: {reason}"
        ) from error


def config_from_teacher(config: dict[str, Any]) -> HybridConfig:
    """A teacher's ``config.json`` as a config whose layers are all attention with RoPE.

    Raises ValueError for a family, a feature or a RoPE type that is not carried, by its name.
    """
    # Before the family: "mixture of experts" tells more than the name of a family that is not known.
    for key, feature in REFUSED.items():
        if config.get(key):
            raise ValueError(f"the teacher uses {feature} ({key} in its config.json), which is not supported")
    family = family_of(config)
    full = _with_defaults(config)
    if family.sliding_window(full):
        raise ValueError(
            "the teacher uses a sliding window, which is not supported: its layers forget, ours do not"
        )
    rope_parameters = dict(full["rope_parameters"])
    if rope_parameters.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ValueError(
            "the teacher rotates a part of each head (partial_rotary_factor), which is not supported"
        )
    return HybridConfig(
        **{key: full[key] for key in CARRIED if key in full},
        rope_parameters=rope_parameters,
        attention_bias=family.attention_bias(full),
        attention_output_bias=family.output_bias(full),
        mlp_bias=family.mlp_bias(full),
        qk_norm=family.qk_norm,
        layer_types=[FULL] * full["num_hidden_layers"],
        attention_rope=True,
    )
