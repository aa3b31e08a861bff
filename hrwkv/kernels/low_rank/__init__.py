"""The second halves of a mixer's low-rank products; a form is chosen by device and shape.

``naive`` is the definition: an activation and a product for each. For a few tokens on a GPU, without a
gradient, ``fused`` does all of them in one launch: there each costs more in its launch than in its bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hrwkv.kernels.low_rank import naive
from hrwkv.kernels.low_rank.naive import Activation

__all__ = ["Activation", "expand"]

# By bytes of an element. The fused form reads the weights again for every 64 tokens, in fp32 for every 16.
FEW_TOKENS = {2: 512, 4: 64}


def expand(
    inner: Sequence[Tensor], up: Sequence[Tensor], *, activations: Sequence[Activation]
) -> list[Tensor]:
    """``activation(inner) up`` for each of several low-rank products, hxa079.md (5 to 8, 14, 31, 32).

    inner: [T, R] each, R its own, any strides, one float dtype. up: [R, C] each, C its own, dtype of inner.
    Returns [T, C] each, in their dtype; everything has gradients.
    """
    few = len(inner[0]) <= FEW_TOKENS.get(inner[0].element_size(), 0)
    if few and inner[0].is_cuda and not torch.is_grad_enabled():
        from hrwkv.kernels.low_rank import fused

        return fused.expand(inner, up, activations=activations)
    return naive.expand(inner, up, activations=activations)
