"""How long a stage takes on named GPUs, from what its steps compute and move.

Products go by operations, everything else by bytes: that is what limits each of them. The rates are those
that benchmarks/results/2026-11-25_h200_kernels.md measured on an H200, as shares of its data sheet, and are
taken for the same shares of other chips, until a calibration corrects them. Left out: launches, which rule
small models, data loading, validation and checkpoints.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from hrwkv.distill.gpus import Gpu
from hrwkv.distill.plan_memory import Pair, plan_memory
from hrwkv.distill.stages import STAGES
from hrwkv.model.config import HybridConfig
from hrwkv.model.flops import forward_operations, mixing_operations
from hrwkv.settings import DistillSettings

# Large bf16 products, 687 of 989 TFLOP/s; causal attention forward, 408.
PRODUCTS, ATTENTION = 0.695, 0.41
# Products with frozen weights, forward and backward, from whole steps (2026-11-25_h200_distillation.md). In
# float8, with the rounding of inputs, as shares of the fp8 rate: steps of 4309 to 9321 tokens/s within 11 %.
# int8 is widened to bf16 for each product, as shares of the bf16 rate: 7460 tokens/s in stage 1 tells the
# forward, 2727 in stage 2 the backward. float8 is widened too where a chip has no fp8 units.
FLOAT8 = (0.5, 0.5)
WIDENED = (0.547, 0.257)
# mix, recurrence and finish, 8 x 4096 tokens at C = 6144: 4.6 ms forward, 14.2 ms backward, as bytes a token
# and channel at the data sheet's 4.8 TB/s.
MIXER_FORWARD, MIXER_BACKWARD = 110, 340
# Both norms of a block, one launch each, with the residuals and casts around them, and the SwiGLU's gate, one
# launch each way, in bf16 at 85 % of the data sheet's bandwidth: bytes a token and channel.
COPY = 0.85
NORM_FORWARD, NORM_BACKWARD = 26, 40
GATE_FORWARD, GATE_BACKWARD = 6, 10
# Weight, gradient and both moments, read and written once a step.
ADAMW_BYTES = {"adamw": 28, "adamw8bit": 16}
# Share that is left of n GPUs' speed when they exchange weights and gradients; assumed.
SCALING = 0.93


@dataclass(frozen=True)
class Work:
    """What a token needs: operations of products, of those with weights in 8 bits (forward, backward) and of
    attention, and bytes moved by the mixers between their projections, and by the rest."""

    products: float = 0.0
    eight_bit: float = 0.0
    eight_bit_backward: float = 0.0
    attention: float = 0.0
    mixer_bytes: float = 0.0
    other_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))

    def seconds(self, gpu: Gpu, *, dtype: str, frozen_dtype: str = "bfloat16") -> float:
        """Time on one GPU; dtype: of the products, ``float32`` or ``bfloat16``; frozen_dtype: of the rest."""
        peak = gpu.bf16 if dtype == "bfloat16" else gpu.fp32
        products = self.products / (PRODUCTS * peak) + self.attention / (ATTENTION * peak)
        computes = frozen_dtype == "float8" and gpu.fp8 > gpu.bf16
        rate, (forward, backward) = (gpu.fp8, FLOAT8) if computes else (gpu.bf16, WIDENED)
        eight_bit = (self.eight_bit / forward + self.eight_bit_backward / backward) / rate
        moved = self.mixer_bytes / gpu.bandwidth + self.other_bytes / (COPY * gpu.bandwidth)
        return products + eight_bit + moved


def tokens_per_second(pair: Pair, settings: DistillSettings, *, stage: int, gpu: Gpu, gpus: int) -> float:
    """Tokens a second of all GPUs together, optimiser's step included."""
    own = settings.stage(stage)
    trained = plan_memory(pair, settings, stage=stage, gpus=gpus).trained
    step = trained * ADAMW_BYTES[own.optimiser] / (COPY * gpu.bandwidth) / settings.batch_tokens(stage)
    work = stage_work(pair, settings, stage=stage)
    seconds = work.seconds(gpu, dtype=settings.dtype, frozen_dtype=settings.frozen_dtype) + step
    return gpus * (1.0 if gpus == 1 else SCALING) / seconds


def stage_work(pair: Pair, settings: DistillSettings, *, stage: int) -> Work:
    """A token's work in stage 1, 2 or 3, recomputed blocks included."""
    context_length, own = settings.context_length(stage), settings.stage(stage)
    narrow = settings.frozen_dtype != "bfloat16"
    teacher = _blocks(pair.teacher, context_length, narrow_mixers=narrow, narrow_mlps=narrow)
    ours = forward_operations(pair.student, context_length=context_length)
    if STAGES[stage].mixers_only:
        # The backward pass ends at the mixers' inputs.
        mixing = _mixer_bytes(pair.student, forwards=1, backward=True)
        return teacher + Work(products=2 * ours.entry + 3 * ours.inner, mixer_bytes=mixing)
    again, trains_all = own.gradient_checkpointing, settings.mode == "all"
    student = _blocks(
        pair.student,
        context_length,
        mixers=2 if again and own.keep != "mixer" else 1,
        mlps=2 if again and own.keep != "mlp" else 1,
        backward=True,
        mlps_train=trains_all,
        narrow_mlps=narrow,
    )
    theirs = forward_operations(pair.teacher, context_length=context_length)
    return teacher + student + Work(products=theirs.head + (2 + trains_all) * ours.head)


def _blocks(
    config: HybridConfig,
    context_length: int,
    *,
    mixers: int = 1,
    mlps: int = 1,
    backward: bool = False,
    mlps_train: bool = False,
    narrow_mixers: bool = False,
    narrow_mlps: bool = False,
) -> Work:
    """All blocks: so many forward passes of mixers and MLPs, and with ``backward`` one of each back.

    mlps_train: their weights have gradients, as mixers' always do. narrow: the weights are in 8 bits.
    """
    forward = forward_operations(config, context_length=context_length)
    mixer = forward.projections * (mixers + 2 * backward)
    mlp = forward.mlp * (mlps + backward * (1 + mlps_train))
    attention = sum(mixing_operations(config, n, context_length=context_length) for n in config.full_layers)
    norms = config.hidden_size * (max(mixers, mlps) * NORM_FORWARD + backward * NORM_BACKWARD)
    gates = config.intermediate_size * (mlps * GATE_FORWARD + backward * GATE_BACKWARD)
    backward_mlp = forward.mlp * backward * narrow_mlps  # frozen, so of its inputs alone
    eight_bit = mixer * narrow_mixers + mlp * narrow_mlps
    return Work(
        products=mixer + mlp - eight_bit,
        eight_bit=eight_bit - backward_mlp,
        eight_bit_backward=backward_mlp,
        # A fused backward pass has twice a forward's products and makes the forward's first again.
        attention=attention * (mixers + 2.5 * backward),
        mixer_bytes=_mixer_bytes(config, forwards=mixers, backward=backward),
        other_bytes=config.num_hidden_layers * (norms + gates),
    )


def _mixer_bytes(config: HybridConfig, *, forwards: int, backward: bool) -> float:
    """RWKV-7 mixers between their projections."""
    channels = len(config.linear_layers) * config.num_attention_heads * config.head_dim
    return channels * (forwards * MIXER_FORWARD + backward * MIXER_BACKWARD)
