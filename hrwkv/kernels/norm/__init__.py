"""RMSNorm, alone or of a sum that is needed besides; a form is chosen by device.

``naive`` is the definition. ``fused`` is one Triton launch forward and one backward: as tensor operations the
norms of a 21B model move as much memory in a training step as a tenth of its matrix products take time.
"""

from types import ModuleType

from torch import Tensor

from hrwkv.kernels.norm import naive

__all__ = ["add_rms_norm", "rms_norm"]

# One row must fit the registers of a program.
WIDEST = 16384


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in fp32 (hxa079.md 1).

    x: [..., D] float32, bfloat16 or float16. weight: [D] any float dtype. Returns x's shape and dtype; both
    have gradients.
    """
    y: Tensor = _form(x).rms_norm(x, weight, eps=eps)
    return y


def add_rms_norm(x: Tensor, delta: Tensor, *, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, rounded to the dtype that torch would give it, and ``rms_norm`` of what was rounded.

    x, delta: [..., D] float32, bfloat16 or float16, of one shape. Returns both in the sum's dtype; x, delta
    and weight have gradients, through either result.
    """
    total, y = _form(x).add_rms_norm(x, delta, weight=weight, eps=eps)
    return total, y


def _form(x: Tensor) -> ModuleType:
    if x.is_cuda and x.numel() and x.shape[-1] <= WIDEST:
        from hrwkv.kernels.norm import fused

        return fused
    return naive
