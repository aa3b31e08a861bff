"""The values of a recipe: one frozen dataclass per verb, filled from TOML and flags, checked whole at once.

They are plain data without torch, so a command can read, print and compare a recipe before anything loads.
Each field's meaning stands in its docstring; what only the data or the model can tell is checked there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise the ValueError that every bad setting ends in."""
    if not condition:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class DataSettings:
    """What text a distillation reads and how it is packed."""

    sources: tuple[str, ...] = ("stdlib",)
    """Text files, folders, .jsonl files, or ``stdlib``: the sources of the running Python."""
    max_bytes: int = 0
    """Bytes of training text that are read at most, spread over all documents; 0 reads everything."""
    passkey_share: float = 0.0
    """Share of the tokens that are generated passkey documents, 0 to 1."""
    context_length: int = 512
    """Tokens of a row; no sequence is longer."""
    batch_tokens: int = 1024
    """Tokens of a step over all processes, a multiple of context_length."""
    seed: int = 0
    """Order of the rows and choice of the passkeys."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        _require(len(self.sources) > 0, "data.sources", self.sources, "at least one text source")
        _require(self.max_bytes >= 0, "data.max_bytes", self.max_bytes, "at least 0")
        _require(0 <= self.passkey_share <= 1, "data.passkey_share", self.passkey_share, "0 to 1")
        check_batch(self.context_length, self.batch_tokens, where="data")


def check_batch(context_length: int, batch_tokens: int, *, where: str) -> None:
    """Raise ValueError unless a batch is a positive whole number of rows."""
    _require(context_length >= 2, f"{where}.context_length", context_length, "at least 2 tokens")
    whole = batch_tokens >= context_length and batch_tokens % context_length == 0
    _require(whole, f"{where}.batch_tokens", batch_tokens, f"a multiple of context_length {context_length}")


@dataclass(frozen=True)
class StageSettings:
    """Budget, optimiser and loss of one stage."""

    tokens: int = 1_000_000
    """Training tokens; the learning rate reaches its final value with the last of them."""
    learning_rate: float = 1e-3
    """Peak learning rate of the mixers."""
    base_learning_rate: float | None = None
    """Peak learning rate of all other parameters that train; None takes learning_rate."""
    final_lr_ratio: float = 0.02
    """Learning rate of the last step over the peak; the cosine ends there."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of matrices; vectors are never decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    context_length: int | None = None
    """Tokens of a row in this stage; None takes data.context_length."""
    batch_tokens: int | None = None
    """Tokens of a step in this stage; None takes data.batch_tokens."""
    kl_weight: float = 1.0
    """Weight of KL(teacher || student) at temperature 1; stage 1 has its own loss."""
    ce_weight: float = 0.0
    """Weight of the next token's cross-entropy."""
    hidden_weight: float = 0.0
    """Weight of the residual stream's relative error after each block, in stages 2 and 3. Short runs learn
    about twice as much from a token with it; 0 distils the probabilities alone, as RADLADS does."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time; not for stage 1."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        _require(self.tokens > 0, "stage.tokens", self.tokens, "more than 0")
        _require(self.learning_rate > 0, "stage.learning_rate", self.learning_rate, "more than 0")
        base = self.base_learning_rate
        _require(base is None or base > 0, "stage.base_learning_rate", base, "more than 0, or none")
        _require(0 <= self.final_lr_ratio <= 1, "stage.final_lr_ratio", self.final_lr_ratio, "0 to 1")
        _require(0 <= self.warmup_ratio < 1, "stage.warmup_ratio", self.warmup_ratio, "0 to below 1")
        _require(self.weight_decay >= 0, "stage.weight_decay", self.weight_decay, "at least 0")
        good = all(0 <= beta < 1 for beta in self.betas)
        _require(good, "stage.betas", self.betas, "two numbers, 0 to below 1")
        _require(self.clip >= 0, "stage.clip", self.clip, "at least 0")
        _require(self.hidden_weight >= 0, "stage.hidden_weight", self.hidden_weight, "at least 0")
        weights = (self.kl_weight, self.ce_weight)
        good = min(weights) >= 0 < max(weights)
        _require(good, "stage.kl_weight, ce_weight", weights, "at least 0 and one above 0")


@dataclass(frozen=True)
class DistillSettings:
    """A whole distillation: the data, the three stages, and how often it looks up from its work."""

    mode: Literal["all", "frozen-mlp"] = "all"
    """``all`` trains every parameter in stages 2 and 3; ``frozen-mlp`` leaves embeddings, MLPs, final norm
    and head as the teacher's and shares their memory with it (RADLADS measured a loss of quality)."""
    seed: int = 0
    """Seed of torch's random numbers, set at the start of each stage; packing has data.seed."""
    data: DataSettings = field(default_factory=DataSettings)
    """Text and packing."""
    stage1: StageSettings = field(default_factory=lambda: StageSettings(learning_rate=5e-3))
    """Alignment of the mixers with the teacher's attention."""
    stage2: StageSettings = field(
        default_factory=lambda: StageSettings(learning_rate=1e-3, base_learning_rate=4e-4)
    )
    """Distillation of the whole model."""
    stage3: StageSettings = field(
        default_factory=lambda: StageSettings(learning_rate=2e-4, base_learning_rate=1e-4)
    )
    """Long context."""
    validate_every: int = 100
    """Steps between two validations; 0 validates only at the end of a stage."""
    validation_tokens: int = 8192
    """Tokens of the dev split that a validation reads, at least one batch."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; 0 writes none, and an interrupted stage starts again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` runs the matrix products in bf16, on a GPU only; trained weights stay fp32."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        _require(self.mode in ("all", "frozen-mlp"), "mode", self.mode, "all or frozen-mlp")
        _require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        for name in ("validate_every", "validation_tokens", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for number in (1, 2, 3):
            check_batch(self.context_length(number), self.batch_tokens(number), where=f"stage{number}")

    def stage(self, number: int) -> StageSettings:
        """The settings of stage 1, 2 or 3."""
        stages = {1: self.stage1, 2: self.stage2, 3: self.stage3}
        _require(number in stages, "stage", number, "1, 2 or 3")
        return stages[number]

    def context_length(self, number: int) -> int:
        """Tokens of a row in stage ``number``."""
        own = self.stage(number).context_length
        return self.data.context_length if own is None else own

    def batch_tokens(self, number: int) -> int:
        """Tokens of a step in stage ``number``."""
        own = self.stage(number).batch_tokens
        return self.data.batch_tokens if own is None else own

    def steps(self, number: int) -> int:
        """Steps of stage ``number``: its token budget, the last batch rounded up."""
        return -(-self.stage(number).tokens // self.batch_tokens(number))


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
        _require(keep is None or keep >= 0, "keep_attention", keep, "0 or more layers")
        layers = self.attention_layers or ()
        if repeated := sorted({layer for layer in layers if layers.count(layer) > 1}):
            raise ValueError(f"attention_layers names {repeated[0]} more than once, expected each layer once")
        known = ", ".join(INITIALISATIONS)
        recipe = self.initialisation
        _require(recipe in INITIALISATIONS, "initialisation", recipe, f"one of {known}")
        for name in ("decay_rank", "iclr_rank", "value_rank", "key_rank", "gate_rank"):
            rank = getattr(self, name)
            _require(rank is None or rank >= 1, name, rank, "at least 1, or left out for the formula's size")
        for name in ("receptance_factor", "key_factor", "value_factor", "output_factor"):
            factor = getattr(self, name)
            _require(factor is None or 0 < abs(factor) < float("inf"), name, factor, "a finite number, not 0")
        limit = self.max_shard_gib
        _require(limit is None or limit > 0, "max_shard_gib", limit, "more than 0, or left out")


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
            _require(value is None or 0 < value < float("inf"), name, value, "more than 0")
        scaling = self.lora_scaling
        _require(scaling is None or abs(scaling) < float("inf"), "lora_scaling", scaling, "a finite number")


@dataclass(frozen=True)
class EvalSettings:
    """What a model is measured on."""

    text: tuple[str, ...] = ("stdlib",)
    """Text files, folders, .jsonl files, or ``stdlib``: the sources of the running Python."""
    split: Literal["train", "dev", "test", "all"] = "test"
    """Part of the text; choose settings on dev, report on test."""
    tokens: int = 65536
    """Tokens that are scored, at most all of the split."""
    context_length: int = 1024
    """Tokens of a row; no context is longer."""
    batch_tokens: int = 4096
    """Tokens of one forward."""
    passkey_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    """Prompt lengths of the passkey grid, in tokens."""
    passkey_depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Places of the key in the prompt, 0 (start) to 1 (end)."""
    passkey_samples: int = 4
    """Prompts per cell of the grid; 0 leaves retrieval out."""
    seed: int = 0
    """Choice of rows and passkeys."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the weights are held in; the scores are always computed in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no measurement can have."""
        _require(len(self.text) > 0, "text", self.text, "at least one text source")
        check_batch(self.context_length, self.batch_tokens, where="eval")
        _require(self.tokens >= 2, "tokens", self.tokens, "at least 2")
        _require(self.passkey_samples >= 0, "passkey_samples", self.passkey_samples, "at least 0")
        inside = all(0 <= depth <= 1 for depth in self.passkey_depths)
        _require(inside, "passkey_depths", self.passkey_depths, "numbers from 0 to 1")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does besides converting, distilling and evaluating one student."""

    pure_tokens: int = 250_000
    """Stage 2 tokens of the second student, without any attention layer; 0 leaves it out."""
    prompt: str = (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
        "    def push(self, item):\n        self."
    )
    """Text that teacher and student complete at the end."""
    completion_tokens: int = 48
    """Tokens of each completion."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no demo can have."""
        _require(self.pure_tokens >= 0, "pure_tokens", self.pure_tokens, "at least 0")
        _require(self.completion_tokens >= 1, "completion_tokens", self.completion_tokens, "at least 1")
