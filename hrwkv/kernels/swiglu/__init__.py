"""The SwiGLU's work by elements, ``silu(gate) * up``, and its gradients; a form is chosen by device.

``naive`` is the definition. ``fused`` is one Triton launch each way: as tensor operations the gate alone is
written and read once more, and kept for the backward pass, in the widest tensors that a model has.
"""

from torch import Tensor

from hrwkv.kernels.swiglu import naive

__all__ = ["swiglu", "swiglu_gradients"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in fp32 (fp64 of fp64) and rounded once (hxa079.md 16).

    gate, up: [T, I] in one float dtype, any strides: views of one product are read in place. Returns [T, I]
    in their dtype, contiguous; both have gradients, for which gate and up alone are kept.
    """
    if _runs_fused(gate):
        from hrwkv.kernels.swiglu import fused

        return fused.swiglu(gate, up)
    return naive.swiglu(gate, up)


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``swiglu`` on gate and up, [T, I] each, for grad [T, I] of its result; rounded once."""
    if _runs_fused(gate):
        from hrwkv.kernels.swiglu import fused

        return fused.swiglu_gradients(grad, gate, up)
    for_gate, for_up = naive.swiglu_gradients(grad, gate, up)
    return for_gate.to(gate.dtype), for_up.to(up.dtype)


def _runs_fused(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0 and x.element_size() < 8
