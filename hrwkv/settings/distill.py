"""The stages of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hrwkv.settings.checks import check_batch, require
from hrwkv.settings.data import DataSettings

KEPT = ("nothing", "stream", "mlp", "mixer")
FROZEN_DTYPES = ("bfloat16", "float8", "int8")


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
    micro_batch_tokens: int | None = None
    """Tokens that one process takes at once, a part of its share of a step; None takes the whole share. A
    step's gradient is the sum over its micro-batches. Losses that are relative errors (stage 1,
    hidden_weight) are then the mean of the micro-batches', each relative to its own size."""
    kl_weight: float = 1.0
    """Weight of KL(teacher || student) at temperature 1; stage 1 has its own loss."""
    ce_weight: float = 0.0
    """Weight of the next token's cross-entropy."""
    hidden_weight: float = 0.0
    """Weight of the residual stream's relative error after each block, in stages 2 and 3. Short runs learn
    about twice as much from a token with it; 0 distils the probabilities alone, as RADLADS does."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time; not for stage 1."""
    keep: Literal["nothing", "stream", "mlp", "mixer"] = "nothing"
    """What gradient_checkpointing keeps of a block besides its input: ``stream`` the residual stream between
    its halves, ``mlp`` or ``mixer`` also the inside of that half, which is then not recomputed."""
    optimiser: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps both moments in 8 bits (torchao must be installed): 6 bytes less a weight."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        require(self.tokens > 0, "stage.tokens", self.tokens, "more than 0")
        require(self.learning_rate > 0, "stage.learning_rate", self.learning_rate, "more than 0")
        base = self.base_learning_rate
        require(base is None or base > 0, "stage.base_learning_rate", base, "more than 0, or none")
        require(0 <= self.final_lr_ratio <= 1, "stage.final_lr_ratio", self.final_lr_ratio, "0 to 1")
        require(0 <= self.warmup_ratio < 1, "stage.warmup_ratio", self.warmup_ratio, "0 to below 1")
        require(self.weight_decay >= 0, "stage.weight_decay", self.weight_decay, "at least 0")
        good = all(0 <= beta < 1 for beta in self.betas)
        require(good, "stage.betas", self.betas, "two numbers, 0 to below 1")
        require(self.keep in KEPT, "stage.keep", self.keep, ", ".join(KEPT))
        idle = self.keep != "nothing" and not self.gradient_checkpointing
        require(not idle, "stage.keep", self.keep, "nothing, or gradient_checkpointing switched on")
        require(
            self.optimiser in ("adamw", "adamw8bit"), "stage.optimiser", self.optimiser, "adamw or adamw8bit"
        )
        require(self.clip >= 0, "stage.clip", self.clip, "at least 0")
        require(self.hidden_weight >= 0, "stage.hidden_weight", self.hidden_weight, "at least 0")
        weights = (self.kl_weight, self.ce_weight)
        good = min(weights) >= 0 < max(weights)
        require(good, "stage.kl_weight, ce_weight", weights, "at least 0 and one above 0")


@dataclass(frozen=True)
class DistillSettings:
    """A whole distillation: the data, the three stages, and how often it looks up from its work."""

    base_model: str = ""
    """The teacher's directory or hub name: for a command that names none, and for the model card."""
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
    spike_factor: float = 0.0
    """A step whose loss is this many times the running median is a spike; 0 looks for none."""
    spike_action: Literal["skip", "rollback"] = "skip"
    """``skip`` leaves a spike's gradients out, for which the device is waited for in each step; ``rollback``
    goes back to the last checkpoint and leaves the step out when it comes again."""
    spike_limit: int = 10
    """Spikes of a stage that are borne; one more is an error."""
    validate_every: int = 100
    """Steps between two validations; 0 validates only at the end of a stage."""
    validation_tokens: int = 8192
    """Tokens of the dev split that a validation reads, at least one batch."""
    validation_passkeys: int = 8
    """Passkey prompts of the stage's context length in a validation, scored teacher-forced; none where the
    context is too short for one."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; 0 writes none, and an interrupted stage starts again."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` runs the matrix products in bf16, on a GPU only; trained weights stay fp32."""
    frozen_dtype: Literal["bfloat16", "float8", "int8"] = "bfloat16"
    """How the weights that never train are kept in mode frozen-mlp: ``float8`` or ``int8`` hold the MLPs,
    once for both models, and the teacher's attention in 8 bits, float8 computes in them on Hopper;
    ``bfloat16`` leaves them as dtype says. On one process."""
    parallel: Literal["fsdp2", "zero1", "zero2", "zero3"] = "fsdp2"
    """How several processes (torchrun) share the student: torch's FSDP2, or DeepSpeed's ZeRO, which cuts the
    optimiser's state (1), also gradients (2), also parameters (3). A run may be resumed with another."""
    reduce_each_micro_batch: bool = False
    """With fsdp2: sum gradients over processes after each micro-batch, not once a step; saves memory."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that no run can have."""
        require(self.mode in ("all", "frozen-mlp"), "mode", self.mode, "all or frozen-mlp")
        require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        require(
            self.frozen_dtype in FROZEN_DTYPES, "frozen_dtype", self.frozen_dtype, ", ".join(FROZEN_DTYPES)
        )
        if self.frozen_dtype != "bfloat16" and self.mode != "frozen-mlp":
            raise ValueError(
                f"frozen_dtype is {self.frozen_dtype!r} in mode {self.mode!r}, where MLPs train: "
                "use bfloat16, or mode 'frozen-mlp'"
            )
        kinds = ("fsdp2", "zero1", "zero2", "zero3")
        require(self.parallel in kinds, "parallel", self.parallel, ", ".join(kinds))
        counts = (
            "validate_every",
            "validation_tokens",
            "validation_passkeys",
            "checkpoint_every",
            "spike_limit",
        )
        for name in counts:
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        factor, action = self.spike_factor, self.spike_action
        require(factor == 0 or factor > 1, "spike_factor", factor, "more than 1, or 0")
        require(action in ("skip", "rollback"), "spike_action", action, "skip or rollback")
        for number in (1, 2, 3):
            context_length, micro = self.context_length(number), self.stage(number).micro_batch_tokens
            check_batch(context_length, self.batch_tokens(number), where=f"stage{number}")
            whole = micro is None or (micro > 0 and micro % context_length == 0)
            expected = f"a multiple of context_length {context_length}, or none"
            require(whole, f"stage{number}.micro_batch_tokens", micro, expected)

    def stage(self, number: int) -> StageSettings:
        """The settings of stage 1, 2 or 3."""
        stages = {1: self.stage1, 2: self.stage2, 3: self.stage3}
        require(number in stages, "stage", number, "1, 2 or 3")
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
