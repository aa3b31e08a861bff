"""RMSNorm; a form is chosen by device.

``naive`` is the definition. ``fused`` is one Triton launch forward and one backward: as tensor operations the
norms of a 21B model move as much memory in a training step as a tenth of its matrix products take time.
"""

from torch import Tensor

from hrwkv.kernels.norm import naive

# One row must fit the registers of a program.
WIDEST = 16384


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in fp32 (hxa079.md 1).

    x: [..., D] float32, bfloat16 or float16. weight: [D] any float dtype. Returns x's shape and dtype; both
    have gradients.
    """
    if x.is_cuda and x.numel() and x.shape[-1] <= WIDEST:
        from hrwkv.kernels.norm import fused

        return fused.rms_norm(x, weight, eps=eps)
    return naive.rms_norm(x, weight, eps=eps)
