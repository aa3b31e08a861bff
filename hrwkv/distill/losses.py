"""KL and cross-entropy of two models' next-token distributions, fused with both heads.

Logits are as wide as the vocabulary and by far the largest tensors of a training step. So positions are
taken chunk by chunk: both heads' logits, the loss and its gradient (hxa079.md 25, known in closed form) are
computed while the chunk's logits exist, and multiplied at once into the gradients of the hidden states and of
the head. Everything is fp32; products of bf16 inputs (under autocast on a GPU) are summed and kept in fp32,
because logits rounded to bf16 put a floor under the KL. Left out: temperatures other than 1, second
derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hrwkv.data.packing import IGNORED_LABEL
from hrwkv.kernels.kl import distillation_terms

# Logits of one chunk and model. On a CPU a chunk should stay near the caches; a GPU wants large products.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 2**21, 2**28


@dataclass(frozen=True)
class Measures:
    """Sums over the T positions of a call, each a scalar fp32 tensor without gradient.

    kl: of KL(p_T || p_S), nats. agreement: positions where both models' likeliest token is the same.
    student_nll, teacher_nll: of -log p(label) over the positions with a label, nats; 0 where no labels were
    given.
    """

    kl: Tensor
    agreement: Tensor
    student_nll: Tensor
    teacher_nll: Tensor


def chunk_positions(vocab_size: int, device: torch.device) -> int:
    """Positions per chunk, so that one model's fp32 logits fill the byte budget of the device."""
    budget = GPU_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(16, budget // (4 * vocab_size))


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    num_tokens: int | None = None,
    num_labels: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Measures]:
    """``kl_weight * mean KL(p_T || p_S) + ce_weight * mean -log p_S(label)`` (hxa079.md 24, 25).

    Args:
        student_hidden: [T, D] any float dtype; gradients flow if it needs them.
        student_head: [V, D]; its gradient is computed only if it needs one.
        teacher_hidden: [T, D_T], no gradient.
        teacher_head: [V, D_T], no gradient.
        labels: [T] int64 with IGNORED_LABEL where there is none; needed for ce_weight > 0.
        kl_weight: weight of the KL term.
        ce_weight: weight of the cross-entropy term.
        num_tokens: what the KL's sum is divided by, T by default; a process that holds a part of a batch
        gives the
            whole batch's number, and the processes' losses add up to the batch's.
        num_labels: the same for the cross-entropy, the number of labels by default.
        chunk_tokens: positions whose logits exist at once; by default by bytes.

    Returns:
        The loss, a scalar fp32 tensor (fp64 for fp64 hidden states), and the sums behind it.

    Raises:
        ValueError: ce_weight is positive but labels are missing.
    """
    if ce_weight > 0 and labels is None:
        raise ValueError(f"ce_weight is {ce_weight} but no labels were given: give the next tokens")
    if labels is not None and num_labels is None:
        num_labels = int((labels != IGNORED_LABEL).sum())
    chunk = chunk_tokens or chunk_positions(student_head.shape[0], student_hidden.device)
    kl_scale = kl_weight / max(num_tokens or student_hidden.shape[0], 1)
    ce_scale = ce_weight / max(num_labels or 0, 1)
    loss, *sums = _FusedDistillation.apply(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        labels,
        (kl_scale, ce_scale, chunk),
    )
    return loss, Measures(*sums)


def measure(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor,
) -> Measures:
    """The sums alone, for a validation; arguments as in ``distillation_loss``."""
    _, measures = distillation_loss(
        student_hidden.detach(),
        student_head.detach(),
        teacher_hidden,
        teacher_head,
        labels=labels,
        num_labels=1,
    )
    return measures


class _FusedDistillation(torch.autograd.Function):
    """The loss with its gradients made in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None,
        scales: tuple[float, float, int],
    ) -> tuple[Tensor, ...]:
        kl_scale, ce_scale, chunk = scales
        wants_hidden, wants_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        narrow = _product_dtype(student_hidden, dtype)
        head, teacher = student_head.to(narrow), teacher_head.to(narrow)
        grad_hidden = torch.empty_like(student_hidden, dtype=dtype) if wants_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=dtype) if wants_head else None
        totals = student_hidden.new_zeros(4, dtype=dtype)
        with torch.autocast(student_hidden.device.type, enabled=False):
            for part in _chunks(student_hidden.shape[0], chunk):
                own = student_hidden[part].to(narrow)
                terms, grad = distillation_terms(
                    _product(own, head.T, dtype),  # [c, V]
                    _product(teacher_hidden[part].to(narrow), teacher.T, dtype),
                    labels=None if labels is None else labels[part],
                    kl_scale=kl_scale,
                    ce_scale=ce_scale,
                    gradient_dtype=narrow if wants_hidden or wants_head else None,
                )
                totals += terms
                if grad is not None:
                    if grad_hidden is not None:
                        grad_hidden[part] = _product(grad, head, dtype)
                    if grad_head is not None:
                        _add_product(grad_head, grad.T, own)
        ctx.save_for_backward(grad_hidden, grad_head)  # type: ignore[arg-type]
        ctx.dtypes = student_hidden.dtype, student_head.dtype  # type: ignore[attr-defined]
        loss = kl_scale * totals[0] + ce_scale * totals[2]
        sums = tuple(totals.unbind())
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)  # type: ignore[attr-defined]
        ]
        return *gradients, None, None, None, None


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the heads multiply in: autocast's dtype on a GPU that is under autocast, else fp32 (or fp64)."""
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return dtype


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` with the result in ``dtype``, whatever the inputs' dtype is."""
    if left.dtype == dtype:
        return left @ right
    return torch.mm(left, right, out_dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place, in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
