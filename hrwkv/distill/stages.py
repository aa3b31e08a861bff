"""The stages of RADLADS (arXiv 2505.03005) as rows of a table: what trains, and what one step computes.

Stage 1 aligns each mixer with the teacher's on the teacher's own inputs, layer by layer, so that the
activations of one layer are alive. Stages 2 and 3 distil the teacher's distribution into the whole student. A
step runs its own backward passes and leaves gradients behind; optimiser, schedule, logs and checkpoints are
the trainer's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from hrwkv.data.packing import next_token_labels
from hrwkv.distill.frozen import FROZEN
from hrwkv.distill.losses import Measures, distillation_loss, measure
from hrwkv.distill.parallel import Ranks, blocks_of, gathered, release, total
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.config import HybridConfig
from hrwkv.model.modeling import HybridModel

MIXER = re.compile(r"model\.layers\.\d+\.self_attn\..*")

Mode = Literal["all", "frozen-mlp"]


@dataclass(frozen=True)
class StepInput:
    """This process's part of a micro-batch, and the counts of the whole step that losses are divided by.

    token_ids: [T] int64, T the same on all processes; batch: its sequences; num_tokens, num_labels: of all
    micro-batches of a step on all processes. So the results and gradients of micro-batches just add up.
    """

    token_ids: Tensor
    batch: TokenBatch
    num_tokens: int
    num_labels: int


@dataclass(frozen=True)
class StepResult:
    """What a step leaves beside the gradients; unread tensors, summed over processes.

    Those of a micro-batch are its part of the step's: they add up too.
    loss: scalar. layer_loss: [L] in stage 1. kl, agreement: scalars, means over the tokens, in
    stages 2 and 3.
    """

    loss: Tensor
    layer_loss: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None


@dataclass(frozen=True)
class StepOptions:
    """What stays the same from step to step; the weights are of stages 2 and 3.

    dtype: float32, or bfloat16 for autocast in the forward pass. Gradients never run under autocast.
    backward: the engine's, for a loss that is this process's part of a sum over processes.
    """

    ranks: Ranks
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    dtype: torch.dtype = torch.float32
    backward: Callable[[Tensor], None] = Tensor.backward

    def autocast(self) -> torch.autocast:
        """A context for forward passes.

        Casts are not kept: each weight is used once, and kept casts would be a second copy of the model.
        """
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def share(self, inputs: StepInput) -> float:
        """The micro-batch's tokens on all processes over the step's: the weight of a mean over them."""
        return len(inputs.token_ids) * self.ranks.world / inputs.num_tokens


StepFunction = Callable[[HybridModel, HybridModel, StepInput, StepOptions], StepResult]


@dataclass(frozen=True)
class Stage:
    """One row of the table; ``mixers_only`` says what trains, ``step`` is called with teacher and student."""

    number: int
    title: str
    step: StepFunction
    mixers_only: bool

    def shares(self, mode: Mode) -> bool:
        """True if embeddings, MLPs, final norm and head do not train, so that one process holds them once."""
        return self.mixers_only or mode == "frozen-mlp"


def align_step(
    teacher: HybridModel, student: HybridModel, inputs: StepInput, options: StepOptions
) -> StepResult:
    """Stage 1: ``mean over layers of ||s_l - t_l||^2 / ||t_l||^2`` (hxa079.md 23), gradients in the mixers.

    t_l is the output of the teacher's mixer l, s_l the student's on the same normed input. Inputs are the
    teacher's, and the first layer's value and key are passed on without their graph, so each layer's backward
    runs before the next layer's forward. Of several micro-batches it is the mean, weighted by tokens.
    """
    batch, ranks, losses = inputs.batch, options.ranks, []
    rope, student_rope = teacher.model.rope(batch), student.model.rope(batch)
    with torch.no_grad(), gathered(teacher):
        hidden = teacher.model.embed_tokens(inputs.token_ids)
    first = None
    blocks = blocks_of(teacher)
    for block, following, own in zip(blocks, [*blocks[1:], None], blocks_of(student), strict=True):
        with options.autocast():
            with torch.no_grad(), gathered(block, then=following):
                x = block.input_layernorm(hidden)
                target, _ = block.mix(x, batch, rope)
                hidden = block.feed_forward(hidden, target)
            y, first = own.mix(x, batch, student_rope, first)
        loss = relative_error(y, target, ranks) * options.share(inputs)
        options.backward(loss * (1 / len(student.model.layers)))
        losses.append(loss.detach())
        first = None if first is None else (first[0].detach(), first[1].detach())
    layer_loss = total(torch.stack(losses), ranks)
    return StepResult(loss=layer_loss.mean(), layer_loss=layer_loss)


def relative_error(ours: Tensor, target: Tensor, ranks: Ranks) -> Tensor:
    """This process's part of ``||ours - target||^2 / ||target||^2`` over all processes' tokens, fp32."""
    size = total(target.float().square().sum(), ranks)
    return (ours.float() - target.float()).square().sum() / size


def distill_step(
    teacher: HybridModel, student: HybridModel, inputs: StepInput, options: StepOptions
) -> StepResult:
    """Stages 2 and 3: KL and cross entropy of the whole student (hxa079.md 24, 25).

    With a ``hidden_weight`` the student's residual stream is drawn to the teacher's as well (hxa079.md 30).
    """
    ranks = options.ranks
    stream: list[Tensor] | None = [] if options.hidden_weight > 0 else None
    targets: list[Tensor] | None = [] if options.hidden_weight > 0 else None
    with options.autocast():
        with torch.no_grad():
            teacher_hidden = teacher(inputs.token_ids, inputs.batch, stream=targets)
        hidden = student(inputs.token_ids, inputs.batch, stream=stream)
    with gathered(student.lm_head):  # the loss reads the head from outside its module
        with options.autocast():
            loss, sums = distillation_loss(
                hidden,
                student.lm_head.weight,
                teacher_hidden,
                teacher.lm_head.weight,
                labels=next_token_labels(inputs.token_ids, inputs.batch) if options.ce_weight > 0 else None,
                kl_weight=options.kl_weight,
                ce_weight=options.ce_weight,
                num_tokens=inputs.num_tokens,
                num_labels=inputs.num_labels,
            )
        release(teacher)
        if stream and targets:
            errors = [relative_error(x, y, ranks) for x, y in zip(stream, targets, strict=True)]
            weight = options.hidden_weight * options.share(inputs)
            loss = loss + weight * torch.stack(errors).mean()
        options.backward(loss)
    means = torch.stack([loss.detach(), sums.kl / inputs.num_tokens, sums.agreement / inputs.num_tokens])
    summed_loss, kl, agreement = total(means, ranks).unbind()
    return StepResult(loss=summed_loss, kl=kl, agreement=agreement)


STAGES = {
    1: Stage(1, "align the mixers", align_step, mixers_only=True),
    2: Stage(2, "distil the model", distill_step, mixers_only=False),
    3: Stage(3, "long context", distill_step, mixers_only=False),
}


@torch.no_grad()
def validation_sums(
    teacher: HybridModel, student: HybridModel, inputs: StepInput, options: StepOptions
) -> Measures:
    """KL, agreement and both models' negative log-likelihoods, summed over the tokens of all processes."""
    with options.autocast():
        hidden = student(inputs.token_ids, inputs.batch)
        teacher_hidden = teacher(inputs.token_ids, inputs.batch)
    with options.autocast(), gathered(student.lm_head):
        own = measure(
            hidden,
            student.lm_head.weight,
            teacher_hidden,
            teacher.lm_head.weight,
            labels=next_token_labels(inputs.token_ids, inputs.batch),
        )
    release(teacher)
    release(student)
    sums = torch.stack([own.kl, own.agreement, own.student_nll, own.teacher_nll])
    return Measures(*total(sums, options.ranks).unbind())


def trains(name: str, *, stage: Stage, mode: Mode, unread: frozenset[str]) -> bool:
    """True if the student's parameter of this name trains in this stage; ``unread`` never get a gradient."""
    if name in unread:
        return False
    if stage.mixers_only:
        return MIXER.fullmatch(name) is not None
    return mode == "all" or FROZEN.fullmatch(name) is None


def set_trainable(student: HybridModel, *, stage: Stage, mode: Mode) -> None:
    """Give ``requires_grad`` to what trains and take it from everything else."""
    unread = student.config.unread_parameters
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trains(name, stage=stage, mode=mode, unread=unread))


def check_pair(student: HybridConfig, teacher: HybridConfig) -> None:
    """Raise ValueError unless the student's vocabulary, width and depth are the teacher's."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(
                f"{name} of the student is {ours}, of the teacher {theirs}: give the teacher that "
                "the student was converted from"
            )
    if not student.linear_layers:
        raise ValueError(
            "the student has no RWKV layer: convert the teacher first and give the converted directory"
        )


def split_rows(token_ids: Tensor, batch: TokenBatch, *, context_length: int, ranks: Ranks) -> StepInput:
    """This process's rows of a global batch, on its device.

    token_ids: [T] int64 and its sequences, none of which crosses a multiple of ``context_length``.
    Raises ValueError where the rows cannot be divided among the processes.
    """
    rows = token_ids.shape[0] // context_length
    if rows % ranks.world:
        raise ValueError(
            f"a batch has {rows} rows of {context_length} tokens for {ranks.world} processes: "
            f"make batch_tokens a multiple of {context_length * ranks.world}"
        )
    share = rows // ranks.world * context_length
    start, stop = ranks.rank * share, (ranks.rank + 1) * share
    ends = accumulate(batch.lengths)
    own = tuple(length for length, end in zip(batch.lengths, ends, strict=True) if start < end <= stop)
    assert sum(own) == share
    return StepInput(
        token_ids=token_ids[start:stop].to(ranks.device, non_blocking=True),
        batch=TokenBatch.from_lengths(own, device=ranks.device),
        num_tokens=token_ids.shape[0],
        num_labels=sum(length - 1 for length in batch.lengths if length > 0),
    )
