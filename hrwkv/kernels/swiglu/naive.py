"""``silu(gate) * up`` and its gradients as plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The contract is ``hrwkv.kernels.swiglu.swiglu``'s."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``silu(gate) * up`` on gate and up, fp32 (fp64 of fp64), not rounded."""
    grad, gate, up = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (grad, gate, up))
    sigmoid = gate.sigmoid()
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
