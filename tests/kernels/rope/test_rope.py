"""Both forms of RoPE against complex multiplication in fp64, forward and gradient."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.rope import naive, rotate

fused = pytest.importorskip("hrwkv.kernels.rope.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, Triton's interpreter


def exact(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos, sin).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], dim=-1)


def outputs(form, x: Tensor, grad: Tensor, angles: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = form(x, angles.cos() * 1.3, angles.sin() * 1.3)  # YaRN's factor is in the tables
    return [y.detach(), *torch.autograd.grad(y, x, grad.to(y.dtype))]


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, width = shape
    x, grad = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    return x, grad, 100 * torch.rand(tokens, width // 2, dtype=torch.float64, device=DEVICE)


# K of 96 fills no power of two; 5 heads and 70 heads fill no tile.
@pytest.mark.parametrize("shape", [(7, 5, 96), (3, 70, 64), (1, 1, 2), (16, 2, 8)], ids=str)
@pytest.mark.parametrize("form", [naive.rotate, fused.rotate], ids=["naive", "fused"])
def test_rotation_and_its_gradient(form, shape: tuple[int, int, int]) -> None:
    x, grad, angles = inputs(shape)
    expected = outputs(exact, x, grad, angles)
    y, grad_x = outputs(form, x.float(), grad.float(), angles.to(torch.float64))
    # Tables in fp64 for the reference, rounded inside: a few units of fp32 of numbers up to 6.
    for found, reference in zip((y, grad_x), expected, strict=True):
        torch.testing.assert_close(found.double(), reference, atol=3e-6, rtol=1e-5)


def test_a_view_of_other_strides_is_rotated_too() -> None:
    x, _, angles = inputs((6, 4, 16))
    wide = torch.cat([x, x], dim=1).float()[:, ::2]
    assert not wide.is_contiguous()
    cos, sin = angles.cos().float(), angles.sin().float()
    torch.testing.assert_close(fused.rotate(wide, cos, sin), naive.rotate(wide, cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 64, 96), (333, 8, 128)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_on_a_gpu(dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int]) -> None:
    x, grad, angles = inputs(shape)
    x, grad = (value.to(dtype).double() for value in (x, grad))
    expected = outputs(exact, x, grad, angles)
    form = [y.double() for y in outputs(rotate, x.to(dtype), grad, angles.float())]
    for found, reference in zip(form, expected, strict=True):
        # bf16 rounds numbers up to 6 once; fp32 angles up to 100 are known to 4e-6.
        torch.testing.assert_close(found, reference, atol=5 * tolerance, rtol=0)
