"""KL, cross entropy and their gradient in PyTorch's operations, overwriting the logits to spare memory."""

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
    """Overwrite both logits; the contract is ``hrwkv.kernels.kl.distillation_terms``'s."""
    sums = student.new_zeros(4)
    student.sub_(student.amax(-1, keepdim=True))
    teacher.sub_(teacher.amax(-1, keepdim=True))
    # Both likeliest tokens are now at exactly 0, and a sum of two numbers <= 0 is 0 only where both are:
    # several times cheaper than argmax on a CPU.
    sums[1] = (student + teacher).amax(-1).eq(0).sum()
    p_student, p_teacher = student.exp(), teacher.exp()
    z_student, z_teacher = p_student.sum(-1, keepdim=True), p_teacher.sum(-1, keepdim=True)
    log_z, teacher_log_z = z_student.log().squeeze(-1), z_teacher.log().squeeze(-1)
    valid = picked = None
    if labels is not None:
        valid = labels >= 0
        picked = labels.clamp(min=0).unsqueeze(-1)
        sums[2] = ((log_z - student.gather(-1, picked).squeeze(-1)) * valid).sum()
        sums[3] = ((teacher_log_z - teacher.gather(-1, picked).squeeze(-1)) * valid).sum()
    expected = teacher.sub_(student).mul_(p_teacher).sum(-1) / z_teacher.squeeze(-1)
    sums[0] = (expected + log_z - teacher_log_z).sum()
    if gradient_dtype is None:
        return sums, None
    p_teacher.mul_(kl_scale / z_teacher)
    if ce_scale == 0:
        return sums, p_student.mul_(kl_scale / z_student).sub_(p_teacher).to(gradient_dtype)
    assert valid is not None
    assert picked is not None
    weight = ce_scale * valid.to(student.dtype).unsqueeze(-1)  # [T, 1]
    gradient = p_student.mul_((kl_scale + weight) / z_student).sub_(p_teacher)
    return sums, gradient.scatter_add_(-1, picked, -weight).to(gradient_dtype)
