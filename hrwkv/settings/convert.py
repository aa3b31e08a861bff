"""How a teacher becomes a student, and how published weights become ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import require

INITIALISATIONS = ("hxa079", "radlads")


@dataclass(frozen=True)
class ConvertSettings:
    """How a teacher becomes a student; exactly one of ``attention_layers`` and ``keep_attention`` is given.

    Raises ValueError, naming the field, for a value that no conversion can have.
    """

    attention_layers: tuple[int, ...] | None = None
    """Layers that stay attention, counted from 0; empty for none. All of them makes a copy of the teacher."""
    keep_attention: int | None = None
    """How many layers stay attention, spread evenly over all layers but the first; 0 for none."""
    initialisation: Literal["hxa079", "radlads"] = "hxa079"
    """Initial values of the new parameters: the released models' or the RADLADS paper's."""
    decay_rank: int | None = None
    """Inner size of the decay's low-rank product; None takes the formula's."""
    iclr_rank: int | None = None
    """Inner size of the in-context learning rate's low-rank product; None takes the formula's."""
    value_rank: int | None = None
    """Inner size of the value residual's low-rank product; None takes the formula's."""
    key_rank: int | None = None
    """Inner size of the key residual's low-rank product; None takes the formula's."""
    gate_rank: int | None = None
    """Inner size of the output gate's low-rank product; None takes the formula's."""
    receptance_factor: float | None = None
    """Receptance is the teacher's query times this; None is 0.5, with ``radlads`` 1.0."""
    key_factor: float | None = None
    """Key is the teacher's key times this; None is 0.5, with ``radlads`` 1.0."""
    value_factor: float | None = None
    """Value is the teacher's value times this; None is 0.3, with ``radlads`` 1.0."""
    output_factor: float | None = None
    """Output is the teacher's output times this; None is 0.5, with ``radlads`` 1.0."""
    residual_logit: float | None = None
    """Start of v0 and k0, the logit of layer 0's share in every value and key; None is 0.73, with
    ``radlads`` 1.0. A short run has no time to undo a large share."""
    attention_rope: bool = False
    """RoPE in the layers that stay attention; always on where no layer is RWKV."""
    seed: int = 0
    """Seed of the fresh random matrices; each layer's each tensor draws from its own stream."""
    max_shard_gib: float | None = None
    """Largest file of weights in GiB, two of them in memory; None is one layer, at most half a GiB."""

    def __post_init__(self) -> None:
        """Check what can be told without the teacher."""
        if (self.attention_layers is None) == (self.keep_attention is None):
            came = "neither" if self.attention_layers is None else "both"
            raise ValueError(f"{came} of attention_layers and keep_attention given, expected exactly one")
        keep = self.keep_attention
        require(keep is None or keep >= 0, "keep_attention", keep, "0 or more layers")
        layers = self.attention_layers or ()
        if repeated := sorted({layer for layer in layers if layers.count(layer) > 1}):
            raise ValueError(f"attention_layers names {repeated[0]} more than once, expected each layer once")
        known = ", ".join(INITIALISATIONS)
        recipe = self.initialisation
        require(recipe in INITIALISATIONS, "initialisation", recipe, f"one of {known}")
        for name in ("decay_rank", "iclr_rank", "value_rank", "key_rank", "gate_rank"):
            rank = getattr(self, name)
            require(rank is None or rank >= 1, name, rank, "at least 1, or left out for the formula's size")
        for name in ("receptance_factor", "key_factor", "value_factor", "output_factor"):
            factor = getattr(self, name)
            require(factor is None or 0 < abs(factor) < float("inf"), name, factor, "a finite number, not 0")
        limit = self.max_shard_gib
        require(limit is None or limit > 0, "max_shard_gib", limit, "more than 0, or left out")


@dataclass(frozen=True)
class ImportSettings:
    """What published weights do not say of themselves; None leaves it to a config, preset or teacher."""

    rope_theta: float | None = None
    """Base of RoPE's frequencies."""
    rms_norm_eps: float | None = None
    """Epsilon of the RMS norms."""
    max_position_embeddings: int | None = None
    """Longest context that the model is meant for."""
    head_dim: int | None = None
    """Size of a head, where no tensor has it (hxa07a and hxa07c without q/k norm)."""
    variant: Literal["hxa079", "hxa07a", "hxa07c", "radlads"] | None = None
    """Arithmetic of the mixer, where the source does not say it."""
    linear_rope: bool | None = None
    """RoPE in the RWKV layers; None: yes, unless a config says otherwise."""
    attention_rope: bool | None = None
    """RoPE in the layers that stayed attention; None: no, unless a config says otherwise."""
    lora_scaling: float | None = None
    """Scaling of LoRA and DoRA parts in a training checkpoint; 0.5 and 2.0 are both in use."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype to convert all weights to; None keeps theirs, which must then be one."""
    allow_nan: bool = False
    """Take weights that are not finite."""
    max_shard_gib: float | None = None
    """Largest file of weights in GiB, two of them in memory; None is one layer, at most half a GiB."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no model can have."""
        for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "head_dim", "max_shard_gib"):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), name, value, "more than 0")
        scaling = self.lora_scaling
        require(scaling is None or abs(scaling) < float("inf"), "lora_scaling", scaling, "a finite number")
