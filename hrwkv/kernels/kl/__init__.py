"""KL and cross entropy of two models' logits, and their gradient; arguments are checked, a form is chosen.

``naive`` is the definition. ``inplace_torch`` computes the same in PyTorch's operations and overwrites its
inputs, and serves every device; ``fused`` is one Triton launch, for fp32 logits on a GPU.
"""

import torch
from torch import Tensor

from hrwkv.kernels.kl import inplace_torch


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None,
    kl_scale: float,
    ce_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Sums of the losses over T positions, and the gradient of their weighted sum, hxa079.md (24), (25).

    The gradient is that of ``kl_scale * sum KL(p_T || p_S) + ce_scale * sum -log p_S(label)``.

    Args:
        student: [T, V] logits, fp32 or fp64. Overwritten by some forms.
        teacher: [T, V] logits of the same dtype. Overwritten by some forms.
        labels: [T] int64, negative where there is none, or None for none at all.
        kl_scale: weight of each position's KL in the gradient.
        ce_scale: weight of each label's cross entropy in the gradient.
        gradient_dtype: dtype of the gradient, or None where none is wanted.

    Returns:
        ``[4]`` in the logits' dtype: the sum of KL(p_T || p_S) in nats, the number of positions whose
        likeliest token is the same, the sums of student's and teacher's -log p(label); and the gradient on
        ``student`` [T, V].

    Raises:
        ValueError: shapes or dtypes do not fit, or cross entropy has a weight but no labels.
    """
    if student.dim() != 2 or teacher.shape != student.shape:
        raise ValueError(
            f"logits have shapes {list(student.shape)} and {list(teacher.shape)}, "
            "expected [tokens, vocabulary] twice"
        )
    if student.dtype != teacher.dtype or student.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits are {student.dtype} and {teacher.dtype}, expected float32 or float64 twice")
    if labels is not None and labels.shape != student.shape[:1]:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected [{len(student)}], one a position")
    if labels is None and ce_scale != 0:
        raise ValueError(f"ce_scale is {ce_scale} but no labels were given: give the next tokens")
    form = inplace_torch.distillation_terms
    if student.is_cuda and student.dtype == torch.float32:
        from hrwkv.kernels.kl import fused

        form = fused.distillation_terms
    return form(
        student,
        teacher,
        labels=labels,
        kl_scale=kl_scale,
        ce_scale=ce_scale,
        gradient_dtype=gradient_dtype,
    )
