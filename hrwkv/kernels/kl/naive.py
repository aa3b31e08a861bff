"""KL and cross entropy of two models' logits with their gradient, as the formulas say: the definition.

It keeps every intermediate as wide as the vocabulary, in the dtype of the logits.
"""

import torch
from torch import Tensor


def distillation_terms(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None,
    kl_scale: float,
    ce_scale: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Follow hxa079.md (24), (25); the contract is ``hrwkv.kernels.kl.distillation_terms``'s."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    p_student, p_teacher = log_student.exp(), log_teacher.exp()
    kl = (p_teacher * (log_teacher - log_student)).sum()
    # Logits and not probabilities: two logits may round to the same probability.
    likeliest = [logits == logits.amax(-1, keepdim=True) for logits in (student, teacher)]
    agreement = (likeliest[0] & likeliest[1]).any(-1).sum()
    sums = [kl, agreement, kl.new_zeros(()), kl.new_zeros(())]
    gradient = kl_scale * (p_student - p_teacher)
    if labels is not None:
        rows = (labels >= 0).nonzero().squeeze(-1)  # the positions that have a label
        picked = labels[rows]
        sums[2:] = -log_student[rows, picked].sum(), -log_teacher[rows, picked].sum()
        gradient[rows] += ce_scale * p_student[rows]
        gradient[rows, picked] -= ce_scale
    return torch.stack(sums), None if gradient_dtype is None else gradient.to(gradient_dtype)
