"""What a stage holds on each GPU, in bytes, from configs and settings alone.

Weights, gradients and optimiser state are counted tensor by tensor, by the rules that the trainer itself
uses, so they are exact on one process. Activations follow what each operation keeps for its backward pass on
a GPU, in the fused kernels; they, the gathered parts of sharded models and the loss's buffers are estimates.
Left out: the CUDA context and fragments of the allocator, for which ``plan`` keeps a reserve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from hrwkv.distill.frozen import FROZEN
from hrwkv.distill.losses import GPU_CHUNK_BYTES
from hrwkv.distill.stages import STAGES, trains
from hrwkv.model.checkpoint import expected_shapes
from hrwkv.model.config import LINEAR, HybridConfig
from hrwkv.model.modeling import Keep
from hrwkv.settings import DistillSettings

# What frozen_dtype holds in 8 bits: the MLPs, and of the teacher also attention's projections.
EIGHT_BIT = re.compile(r"model\.layers\.\d+\.(mlp\.\w+|self_attn\.[qkvo]_proj)\.weight")
CHUNK = 32  # tokens of a chunk of the recurrence, of which the state before it is kept
# Products that read the normed input of a mixer or MLP: each keeps a cast of its own of an fp32 stream.
READERS = {"linear": 8, "attention": 3, "mlp": 2}
# torchao keeps moments of blocks of 256 in 8 bits, of small or odd tensors in fp32.
MOMENT_BLOCK, SMALLEST_BLOCKED = 256, 4096

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """Configs of student and teacher with the shapes of their tensors; a tied head is counted once."""

    student: HybridConfig
    teacher: HybridConfig
    student_shapes: Shapes
    teacher_shapes: Shapes

    @classmethod
    def of(cls, student: HybridConfig, teacher: HybridConfig) -> Pair:
        """Shapes come from models on the meta device; no weight is made."""
        return cls(student, teacher, expected_shapes(student), expected_shapes(teacher))


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU, by part, and numbers of the student's parameters.

    student: its weights, fp32 masters and what a sharded model has gathered. activations: what one
    micro-batch keeps, and the work of the block whose backward pass runs. logits: buffers of the loss.
    """

    trained: int
    frozen: int
    teacher: int
    student: int
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        names = ("teacher", "student", "gradients", "optimiser", "activations", "logits")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """All parts; the peak is a little lower, because not all are at their largest at once."""
        return sum(self.parts.values())


def plan_memory(pair: Pair, settings: DistillSettings, *, stage: int, gpus: int = 1) -> StageMemory:
    """The memory of stage 1, 2 or 3 on each of ``gpus`` GPUs."""
    unread, row = pair.student.unread_parameters, STAGES[stage]
    trained = {
        name: shape
        for name, shape in pair.student_shapes.items()
        if trains(name, stage=row, mode=settings.mode, unread=unread)
    }
    count = _numel(trained)
    tokens = micro_batch_tokens(settings, stage, gpus=gpus)
    return StageMemory(
        trained=count,
        frozen=_numel(pair.student_shapes) - count,
        teacher=_teacher_bytes(pair, settings, gpus),
        student=_student_bytes(pair, settings, trained, gpus, shares=row.shares(settings.mode)),
        gradients=4 * count // _gradient_shares(settings, stage, gpus),
        optimiser=_moment_bytes(trained, settings.stage(stage).optimiser) // gpus,
        activations=_activation_bytes(pair, settings, stage=stage, tokens=tokens),
        logits=0 if row.mixers_only else _loss_bytes(pair.student, settings, tokens),
    )


def micro_batch_tokens(settings: DistillSettings, stage: int, *, gpus: int) -> int:
    """Tokens that one GPU computes at once."""
    share = settings.batch_tokens(stage) // gpus
    return min(settings.stage(stage).micro_batch_tokens or share, share)


def _numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _width(settings: DistillSettings) -> int:
    """Bytes of a number in matrix products."""
    return 4 if settings.dtype == "float32" else 2


def _teacher_bytes(pair: Pair, settings: DistillSettings, gpus: int) -> int:
    width = _width(settings)
    eight = settings.frozen_dtype != "bfloat16"

    def size(name: str, shape: tuple[int, ...]) -> int:
        if eight and EIGHT_BIT.fullmatch(name):
            return math.prod(shape) + 4 * shape[0]  # a scale a row
        return math.prod(shape) * width

    whole = sum(size(name, shape) for name, shape in pair.teacher_shapes.items())
    if gpus == 1:
        return whole
    return whole // gpus + _gathered(pair.teacher_shapes, lambda name: width)


def _student_bytes(pair: Pair, settings: DistillSettings, trained: Shapes, gpus: int, *, shares: bool) -> int:
    """Masters of what trains, and all the rest that is not the teacher's own."""
    width, masters = _width(settings), 4 * _numel(trained)
    rest = {name: shape for name, shape in pair.student_shapes.items() if name not in trained}
    if gpus == 1:
        own = {name: shape for name, shape in rest.items() if not (shares and FROZEN.fullmatch(name))}
        return masters + 4 * _numel(own)
    if settings.parallel == "fsdp2":
        held = (masters + width * _numel(rest)) // gpus
        # Embeddings and head are gathered as they are kept, so that the stream is what it is on one GPU.
        return held + _gathered(pair.student_shapes, lambda name: 4 if name in trained else width)
    copies = width * _numel(pair.student_shapes)
    if settings.parallel == "zero3":
        return (masters + copies) // gpus + _gathered(pair.student_shapes, lambda name: width)
    return masters // gpus + copies


def _gathered(shapes: Shapes, width: Callable[[str], int]) -> int:
    """What is whole at once: two blocks (one computes, the next arrives), in 2 bytes, and the outer parts."""
    blocks: dict[str, int] = {}
    outer = 0
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            blocks[layer] = blocks.get(layer, 0) + 2 * math.prod(shape)
        else:
            outer += width(name) * math.prod(shape)
    return 2 * max(blocks.values()) + outer


def _gradient_shares(settings: DistillSettings, stage: int, gpus: int) -> int:
    """Among how many GPUs the gradients are divided while they are summed."""
    several = micro_batch_tokens(settings, stage, gpus=gpus) * gpus < settings.batch_tokens(stage)
    whole = settings.parallel == "zero1" or (
        settings.parallel == "fsdp2" and several and not settings.reduce_each_micro_batch
    )
    return 1 if whole else gpus


def _moment_bytes(trained: Shapes, optimiser: str) -> int:
    """Both moments of AdamW."""

    def size(shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        blocked = optimiser == "adamw8bit" and count >= SMALLEST_BLOCKED and count % MOMENT_BLOCK == 0
        return 2 * (count + 4 * count // MOMENT_BLOCK) if blocked else 8 * count

    return sum(map(size, trained.values()))


@dataclass(frozen=True)
class Kept:
    """Bytes a token that a block keeps for its backward pass.

    stream: of the residual stream. mixer, mlp: of the block's halves, each with the stream that it begins
    from. mlp_input: of the second half where the inside of its MLP is computed again.
    """

    stream: int
    mixer: int
    mlp: int
    mlp_input: int

    def checkpointed(self, keep: Keep) -> int:
        """With gradient checkpointing that keeps this besides the block's input."""
        return {
            "nothing": self.stream,
            "stream": self.stream + self.mlp_input,
            "mlp": self.stream + self.mlp,
            "mixer": self.mixer + self.mlp_input,
        }[keep]


def kept_bytes(config: HybridConfig, settings: DistillSettings, *, is_linear: bool) -> Kept:
    """What the operations of a block keep on a GPU.

    A norm keeps its input and one number a row. Where the stream is fp32 (the embeddings train) every product
    casts it anew.
    """
    width, inner = _width(settings), config.intermediate_size
    stream = (2 if width == 2 and settings.mode == "frozen-mlp" else 4) * config.hidden_size
    narrow = width * config.hidden_size
    casts = {kind: (1 if stream == narrow else count) * narrow for kind, count in READERS.items()}
    again = stream  # the MLP's input, where it is computed again
    if settings.frozen_dtype != "bfloat16":
        mlp = 2 * width * inner  # gate and up
        again = config.hidden_size + 4 if settings.frozen_dtype == "float8" else narrow
    elif settings.mode == "frozen-mlp":
        mlp = 2 * width * inner  # gate and up: a frozen product keeps no input
    else:
        mlp = 3 * width * inner + casts["mlp"]
    if is_linear:
        mixer = casts["linear"] + _linear_bytes(config, width)
    else:
        heads = 3 * config.num_attention_heads + 2 * config.num_key_value_heads
        mixer = casts["attention"] + width * heads * config.head_dim
    half = stream + 4
    return Kept(stream, half + mixer, half + mlp, half + again)


def _linear_bytes(config: HybridConfig, width: int) -> int:
    """The RWKV-7 mixer, per token: low-rank insides, rows into mix, mix into wkv7, states, o and y."""
    c, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    ranks = sum(getattr(config, name) for name in config.rank_names)
    rows, gate = 3 * c + 4 * kv, c
    mixed, log_decay = 3 * c + 2 * kv, 4 * c
    states, inner = c * config.head_dim // CHUNK, c
    return width * (ranks + rows + gate + mixed + states + inner + 2 * c) + log_decay


def _backward_work(config: HybridConfig, settings: DistillSettings) -> int:
    """Buffers per token of the larger of a block's two backward passes: the recurrence's, or the MLP's."""
    width, c = _width(settings), config.num_attention_heads * config.head_dim
    chunked = 4 + 4 * CHUNK / config.head_dim + config.head_dim / CHUNK  # W, R, B', K'; squares; dS
    recurrence = round(c * (width * (chunked + 8) + 4))
    return max(recurrence, 3 * width * config.intermediate_size) + 8 * config.hidden_size


def _activation_bytes(pair: Pair, settings: DistillSettings, *, stage: int, tokens: int) -> int:
    """One micro-batch: what blocks keep until their backward passes, and the work of one of them."""
    config, width = pair.student, _width(settings)
    kinds = [kept_bytes(config, settings, is_linear=kind == LINEAR) for kind in config.layer_types]
    largest = max(kinds, key=lambda kept: kept.mixer + kept.mlp)
    work = _backward_work(config, settings)
    if STAGES[stage].mixers_only:
        # The teacher's MLP keeps nothing; its buffers are free again before a mixer's backward pass.
        return tokens * (largest.mixer + work + 4 * width * config.hidden_size)
    own = settings.stage(stage)
    hidden = width * config.hidden_size
    targets = hidden * (1 + (config.num_hidden_layers if own.hidden_weight > 0 else 0))
    if not own.gradient_checkpointing:
        casts = width * sum(math.prod(shape) for shape in pair.student_shapes.values() if len(shape) > 1)
        casts = casts if width == 2 and settings.mode == "all" else 0
        kept = sum(kind.mixer + kind.mlp for kind in kinds)
        return tokens * (kept + targets + work) + casts
    kept = sum(kind.checkpointed(own.keep) for kind in kinds)
    return tokens * (kept + targets + largest.mixer + largest.mlp + work)


def _loss_bytes(config: HybridConfig, settings: DistillSettings, tokens: int) -> int:
    """Logits of one chunk for both models with their gradient, casts and gradients of the head."""
    width, head = _width(settings), config.vocab_size * config.hidden_size
    positions = min(tokens, max(16, GPU_CHUNK_BYTES // (4 * config.vocab_size)))
    logits = positions * config.vocab_size * (4 + 4 + width)
    hidden = 2 * 4 * tokens * config.hidden_size
    # The head's cast, its gradient, a chunk's part of it, and the gradient again when it is scaled.
    trains_head = head * ((width if width == 2 else 0) + 3 * 4) if settings.mode == "all" else 0
    return logits + hidden + trains_head
