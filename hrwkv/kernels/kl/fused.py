"""KL, cross entropy and their gradient from a chunk of both models' logits, in one launch (Triton).

As tensor operations (``inplace_torch``) this is some twenty passes over [T, V] fp32, 126 bytes a logit. Here
one program walks one position twice: once for the maximum and the sum of both softmaxes, kept apart in every
lane so that nothing is exchanged before the end; once more, backwards, for the KL and the gradient. That is
16 bytes read and the gradient written a logit, less where the second walk finds the first one's end cached.

KL terms are added as ``p_T (log p_T - log p_S)`` with both softmaxes finished: nothing large cancels. Each
position's sums go to memory and are added up outside, so the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrwkv.kernels.tuning import Config, choose

# Warps enough to fill a multiprocessor and tiles that fit its registers; columns a tile, BV, divide by 4.
CANDIDATES = (
    Config(BV=4096, num_warps=8),
    Config(BV=2048, num_warps=4),
    Config(BV=2048, num_warps=8),
    Config(BV=4096, num_warps=4),
    Config(BV=16384, num_warps=16),
)
# Positions beyond this number change nothing but the number of waves.
TUNED_POSITIONS = 1024


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None,
    kl_scale: float,
    ce_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; the contract is ``hrwkv.kernels.kl.distillation_terms``'s, logits are fp32."""
    student, teacher = student.contiguous(), teacher.contiguous()
    num_positions, vocab = student.shape
    sums = torch.empty(4, num_positions, dtype=torch.float32, device=student.device)
    gradient = None if gradient_dtype is None else torch.empty_like(student, dtype=gradient_dtype)

    def launch(config: Config) -> None:
        _distillation_terms[(num_positions,)](
            student,
            teacher,
            # Where there are none, any pointer does: it is never read.
            sums if labels is None else labels.contiguous(),
            sums,
            sums if gradient is None else gradient,
            num_positions,
            vocab,
            kl_scale,
            ce_scale,
            HAS_LABELS=labels is not None,
            HAS_GRADIENT=gradient is not None,
            **config,
        )

    if num_positions:
        key = (vocab, str(gradient_dtype), min(TUNED_POSITIONS, triton.next_power_of_2(num_positions)))
        launch(choose("kl", key, CANDIDATES, launch, device=student.device))
    return sums.sum(-1), gradient


@triton.jit
def _exp(x):
    # tl.exp spends three more instructions on results under 1e-38, which no sum here can feel.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _accumulate(logits, maximum, total):
    """Take a tile [LANES, 4] into the maximum and the sum of exp(logit - maximum) of each lane [LANES]."""
    larger = tl.maximum(maximum, tl.max(logits, 1))
    return larger, total * _exp(maximum - larger) + tl.sum(_exp(logits - larger[:, None]), 1)


@triton.jit
def _combine(maximum, total):
    """Maximum of a row, and the logarithm of its sum of exp(logit - maximum)."""
    whole = tl.max(maximum, 0)
    return whole, tl.log(tl.sum(total * _exp(maximum - whole), 0))


@triton.jit
def _distillation_terms(
    student,  # [T, V] fp32
    teacher,  # [T, V] fp32
    labels,  # [T] int64
    sums,  # [4, T] fp32: KL, agreement, student's and teacher's -log p(label)
    gradient,  # [T, V]
    num_positions,
    vocab,
    kl_scale,
    ce_scale,
    HAS_LABELS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    student += position * vocab
    teacher += position * vocab
    gradient += position * vocab
    sums += position
    # Four neighbours a lane: one load of 16 bytes, and one correction of the lane's sum for all of them.
    LANES: tl.constexpr = BV // 4
    lanes = tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    num_tiles = tl.cdiv(vocab, BV)

    # Finite, so that a lane without a logit gives exp(-large) = 0 and not exp(-inf + inf).
    max_s = tl.full([LANES], -1e38, tl.float32)
    max_t = tl.full([LANES], -1e38, tl.float32)
    sum_s = tl.zeros([LANES], tl.float32)
    sum_t = tl.zeros([LANES], tl.float32)
    for tile in range(0, num_tiles):
        column = tile * BV + lanes
        s = tl.load(student + column, mask=column < vocab, other=float("-inf"))
        t = tl.load(teacher + column, mask=column < vocab, other=float("-inf"))
        max_s, sum_s = _accumulate(s, max_s, sum_s)
        max_t, sum_t = _accumulate(t, max_t, sum_t)
    top_s, log_z_s = _combine(max_s, sum_s)
    top_t, log_z_t = _combine(max_t, sum_t)

    label = tl.full([], -1, tl.int64)
    weight = 0.0
    student_nll = 0.0
    teacher_nll = 0.0
    if HAS_LABELS:
        label = tl.load(labels + position)
        if label >= 0:
            weight = ce_scale
            student_nll = log_z_s - (tl.load(student + label) - top_s)
            teacher_nll = log_z_t - (tl.load(teacher + label) - top_t)

    kl = tl.zeros([LANES], tl.float32)
    agreement = tl.zeros([LANES], tl.int32)
    # Backwards: the tiles read last are the ones still in the cache.
    for step in range(0, num_tiles):
        column = (num_tiles - 1 - step) * BV + lanes
        inside = column < vocab
        s = tl.load(student + column, mask=inside, other=0.0) - top_s
        t = tl.load(teacher + column, mask=inside, other=0.0) - top_t
        agreement |= tl.max((inside & (s == 0) & (t == 0)).to(tl.int32), 1)
        log_s = s - log_z_s
        log_t = t - log_z_t
        p_t = _exp(log_t)
        kl += tl.sum(tl.where(inside, p_t * (log_t - log_s), 0.0), 1)
        if HAS_GRADIENT:
            slope = (kl_scale + weight) * _exp(log_s) - kl_scale * p_t
            if HAS_LABELS:
                slope -= tl.where(column == label, weight, 0.0)
            tl.store(gradient + column, slope.to(gradient.dtype.element_ty), mask=inside)

    tl.store(sums, tl.sum(kl, 0))
    tl.store(sums + num_positions, tl.max(agreement, 0).to(tl.float32))
    tl.store(sums + 2 * num_positions, student_nll)
    tl.store(sums + 3 * num_positions, teacher_nll)
