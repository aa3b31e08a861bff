"""Modules with frozen 8-bit weights against ``nn.Linear`` and ``SwiGLU`` with the same rounded weights."""

import pytest
import torch

from hrwkv.kernels.matmul import dequantise
from hrwkv.layers.common import SwiGLU
from hrwkv.layers.linear import FrozenLinear, FrozenSwiGLU

DTYPES = [torch.float8_e4m3fn, torch.int8]


def pair(*, bias: bool, dtype: torch.dtype) -> tuple[FrozenSwiGLU, SwiGLU]:
    """The same MLP in both forms; the plain one has the rounded weights."""
    plain, frozen = SwiGLU(24, 40, bias=bias), FrozenSwiGLU(24, 40, dtype=dtype, bias=bias)
    for name, linear in plain.named_children():
        own = frozen.get_submodule(name)
        own.fill(linear.weight.detach())
        with torch.no_grad():
            linear.weight.copy_(dequantise(own.weight, torch.float32))
            if bias:
                own.bias.copy_(linear.bias.uniform_())
    return frozen, plain


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_mlp_is_the_mlp_of_its_rounded_weights(
    dtype: torch.dtype, bias: bool, recompute: bool
) -> None:
    frozen, plain = pair(bias=bias, dtype=dtype)
    x, grad = torch.randn(2, 11, 24)
    results = []
    for mlp in (frozen, plain):
        own = x.clone().requires_grad_()
        y = mlp(own, recompute=recompute)
        results.append((y.detach(), torch.autograd.grad(y, own, grad)[0]))
    torch.testing.assert_close(*results)


def test_nothing_of_a_frozen_weight_trains_or_is_saved() -> None:
    frozen, _ = pair(bias=True, dtype=torch.int8)
    assert frozen.state_dict().keys() == {f"{name}_proj.bias" for name in ("gate", "up", "down")}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_holds_tells_a_change_of_one_element(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8)
    linear = FrozenLinear(8, 6, dtype=dtype)
    linear.fill(weight)
    assert linear.holds(weight.double())
    weight[4, 2] *= 1.5
    assert not linear.holds(weight)
    assert not linear.holds(weight[:5])


def test_autocast_decides_the_dtype() -> None:
    """As for nn.Linear: bf16 comes out, and the residual stream's gradient is in the input's dtype."""
    frozen, plain = pair(bias=False, dtype=torch.int8)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [frozen(x), plain(x), frozen.gate_proj(x)]
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    # bf16 products in another order of roundings.
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)
    (grad,) = torch.autograd.grad(outputs[0].sum(), x)
    assert grad.dtype == torch.float32
