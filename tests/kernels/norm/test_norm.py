"""Both forms of RMSNorm against its formula in fp64, forward and gradients."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.norm import naive, rms_norm

fused = pytest.importorskip("hrwkv.kernels.norm.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, Triton's interpreter
# fp32 sums over up to 300 elements; bf16 rounds the result once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def exact(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def outputs(form, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = form(x, weight, eps=1e-5)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x with rows of very different size, the weight, and a gradient of the result."""
    x, grad = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    sizes = torch.logspace(-2, 2, shape[0], dtype=torch.float64, device=DEVICE)
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64, device=DEVICE)
    return x * sizes.view(-1, *[1] * (len(shape) - 1)), weight, grad


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


# Rows that fill no tile, several rows a tile, more tiles than programs, one element.
@pytest.mark.parametrize("shape", [(7, 300), (3, 5, 24), (401, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("form", [naive.rms_norm, fused.rms_norm], ids=["naive", "fused"])
def test_norm_and_its_gradients_are_the_formulas(form, shape: tuple[int, ...]) -> None:
    x, weight, grad = inputs(shape)
    expected = outputs(exact, x, weight, grad)
    found = outputs(form, x.float(), weight.float(), grad.float())
    for value, reference in zip(found[:2] if shape == (1, 1) else found, expected, strict=False):
        assert value.shape == reference.shape
        assert value.isfinite().all()
        assert (value.double() - reference).norm() <= 2e-6 * reference.norm() + 1e-6


def test_a_frozen_weight_changes_no_gradient_of_x() -> None:
    x, weight, grad = (value.float() for value in inputs((9, 40)))
    _, with_weight, _ = outputs(fused.rms_norm, x, weight, grad)
    x.requires_grad_()
    (alone,) = torch.autograd.grad(fused.rms_norm(x, weight, eps=1e-5), x, grad)
    assert torch.equal(alone, with_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1000, 6144), (700, 64, 96), (3, 16384)], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, grad = inputs(shape)
    x, grad = (value.to(dtype).double() for value in (x, grad))
    expected = outputs(exact, x, weight, grad)
    found = outputs(rms_norm, x.to(dtype), weight, grad.to(dtype))
    for value, reference in zip(found, expected, strict=True):
        assert error(value, reference) < TOLERANCE[dtype]
