"""RoPE of a teacher's queries and keys; a form is chosen by device.

``naive`` is the definition, some fifteen passes over x; ``fused`` is one Triton launch. The RWKV-7 mixer has
its own inside ``kernels/mix``.
"""

from torch import Tensor

from hrwkv.kernels.rope import naive


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head by its position (hxa079.md 4; RoFormer, arXiv 2104.09864).

    x: [T, H, K] float32, bfloat16 or float16. cos, sin: [T, K / 2] fp32. Returns x's shape and dtype,
    computed in fp32: bf16 tables lose the position beyond a few hundred tokens. x has a gradient.
    """
    if x.is_cuda and x.numel():
        from hrwkv.kernels.rope import fused

        return fused.rotate(x, cos, sin)
    return naive.rotate(x, cos, sin)
