"""What weights do not tell: RoPE's base, the norms' epsilon, the longest context; who says it.

Sources of facts, the first that speaks counts: the ``config.json`` beside the weights, a preset chosen with
``--like``, the teacher, flags; last a shipped preset whose sizes fit, if all that fit agree. Two that
contradict each other are an error, and what nobody says is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrwkv.convert.presets import Preset, matching
from hrwkv.model.config import HybridConfig
from hrwkv.model.families import REFUSED, config_from_teacher
from hrwkv.model.shards import CheckpointError
from hrwkv.settings import ImportSettings

PUBLISHED_VARIANTS = ("hxa079", "hxa07a", "hxa07c")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CARRIED = ("rope_parameters", "rms_norm_eps", "max_position_embeddings", *TOKEN_IDS)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
# What a RADLADS model must be for this mixer: key of its config.json -> value, and what another value means.
BALANCED = {
    "balance_state": (True, "keys scaled as in RWKV-7 World (k_k, k_a)"),
    "groupnorm_att": (False, "a group norm behind the recurrence"),
    "use_tokenshift": (False, "token shift"),
}


@dataclass
class Facts:
    """Values by field of ``HybridConfig``, and who said each."""

    values: dict[str, Any] = field(default_factory=dict)
    said_by: dict[str, str] = field(default_factory=dict)

    def learn(self, values: Mapping[str, Any], speaker: str) -> None:
        """Take what is not known yet; None says nothing."""
        for name, value in values.items():
            if value is not None and name not in self.values:
                self.values[name], self.said_by[name] = value, speaker

    def insist(self, values: Mapping[str, Any], speaker: str) -> None:
        """``learn``, but a value that contradicts what is known raises CheckpointError."""
        for name, value in values.items():
            known = self.values.get(name)
            if value is not None and known is not None and known != value:
                raise CheckpointError(
                    f"{speaker} says {name} {value}, but {self.said_by[name]} says {known}: "
                    "leave out the one that is wrong"
                )
        self.learn(values, speaker)


def gather(
    config: Mapping[str, Any] | None,
    settings: ImportSettings,
    *,
    like: Preset | None,
    teacher: HybridConfig | None,
    where: Path,
) -> Facts:
    """Everything that is said about a source besides its tensors.

    config: the source's ``config.json``, if there is one. Raises CheckpointError for contradictions and for a
    published feature or variant that is not supported.
    """
    facts = Facts()
    if config is not None:
        facts.learn(published_facts(config, where), f"{where.name}'s config.json")
    if like is not None:
        facts.learn(config_facts(config_from_teacher(like.teacher)), f"preset {like.name}")
    if teacher is not None:
        facts.learn(config_facts(teacher), "the teacher")
    flags = {
        "rms_norm_eps": settings.rms_norm_eps,
        "max_position_embeddings": settings.max_position_embeddings,
        "head_dim": settings.head_dim,
        "variant": settings.variant,
        "linear_rope": settings.linear_rope,
        "attention_rope": settings.attention_rope,
    }
    facts.insist(flags, "the command line")
    if settings.rope_theta is not None:
        known = facts.values.get("rope_parameters", {}).get("rope_theta", settings.rope_theta)
        if known != settings.rope_theta:
            raise CheckpointError(
                f"the command line says rope_theta {settings.rope_theta:g}, but "
                f"{facts.said_by['rope_parameters']} says {known:g}: leave out the one that is wrong"
            )
        plain = {"rope_type": "default", "rope_theta": settings.rope_theta}
        facts.learn({"rope_parameters": plain}, "the command line")
    return facts


def config_facts(config: HybridConfig) -> dict[str, Any]:
    """What a teacher's config says about its student, however many layers that keeps."""
    return {name: getattr(config, name) for name in (*CARRIED, "head_dim")}


def published_facts(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The facts in a published ``config.json`` (RWKV-Infer's or RADLADS').

    Raises CheckpointError for a variant or a feature that is not supported, by its name.
    """
    if config.get("model_type") == HybridConfig.model_type:
        raise CheckpointError(f"{where} is one of our directories already: use it as it is")
    for key, feature in REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{where} uses {feature} ({key} in its config.json), which is not supported"
            )
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if (theta := scaling.pop("rope_theta", config.get("rope_theta"))) is not None:
        kind = scaling.pop("type", None)
        scaling = {"rope_type": kind or "default", **scaling, "rope_theta": float(theta)}
    facts: dict[str, Any] = {name: config.get(name) for name in (*CARRIED[1:], "head_dim")}
    facts.update(rope_parameters=scaling or None, tie_word_embeddings=config.get("tie_word_embeddings"))
    architecture = config.get("rwkv_architecture")
    if architecture is not None:
        if architecture not in PUBLISHED_VARIANTS:
            raise CheckpointError(
                f"{where} has rwkv_architecture {architecture!r}, "
                f"expected one of {', '.join(PUBLISHED_VARIANTS)}"
            )
        # Both runtimes leave the attention layers without positions unless told otherwise.
        facts.update(
            variant=architecture,
            attention_rope=not config.get("nope_in_transformer", True),
            linear_rope=not config.get("nope_in_rwkv", False),
        )
    elif "balance_state" in config or "rwkv7" in str(config.get("model_type")):
        facts.update(_radlads_facts(config, where))
    return facts


def _radlads_facts(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    for key, (expected, meaning) in BALANCED.items():
        if key not in config:
            raise CheckpointError(
                f"{where}: config.json does not say {key}: add what the model was trained with"
            )
        if bool(config[key]) != expected:
            raise CheckpointError(
                f"{where} uses {meaning} ({key} in its config.json), which is not supported"
            )
    if "use_rope" not in config:
        raise CheckpointError(
            f"{where}: config.json does not say use_rope: add what the model was trained with"
        )
    # One switch there for recurrent and kept attention layers.
    return {
        "variant": "radlads",
        "linear_rope": bool(config["use_rope"]),
        "attention_rope": bool(config["use_rope"]),
    }


def ask_presets(facts: Facts, presets: Sequence[Preset], sizes: Mapping[str, Any], where: Path) -> None:
    """Fill what is missing from the shipped presets of these sizes, if all of them agree.

    Raises CheckpointError, saying what to give, for RoPE's base or the norms' epsilon that nobody knows.
    """
    needed = [name for name in ("rope_parameters", "rms_norm_eps") if name not in facts.values]
    if not needed:
        return
    fits = matching(presets, {name: sizes[name] for name in SIZES})
    known = [config_facts(config_from_teacher(preset.teacher)) for preset in fits]
    names = ", ".join(preset.name for preset in fits)
    for name in CARRIED:
        if known and all(one[name] == known[0][name] for one in known):
            facts.learn({name: known[0][name]}, f"preset {names}")
        elif known and name in CARRIED[:3] and name not in facts.values:
            raise CheckpointError(f"{where} fits {names}, which differ in {name}: choose one with --like")
    flags = {"rope_parameters": "--rope-theta", "rms_norm_eps": "--rms-norm-eps"}
    if missing := [flags[name] for name in needed if name not in facts.values]:
        raise CheckpointError(
            f"{where} does not say what its RoPE or its norms are, and wrong values give fluent nonsense: "
            f"give {' and '.join(missing)}, or --like with a preset"
        )


def check_like(preset: Preset, sizes: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError if the tensors are not those of a student of this preset's teacher."""
    teacher = config_from_teacher(preset.teacher)
    for name in (*SIZES, "num_attention_heads", "num_key_value_heads", "head_dim", "qk_norm"):
        if getattr(teacher, name) != sizes[name]:
            raise CheckpointError(
                f"{where} has {name} {sizes[name]}, but {preset.name} has {getattr(teacher, name)}: "
                "choose another preset"
            )
