"""Both forms of RMSNorm against its formula in fp64, forward and gradients."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.norm import add_rms_norm, naive, rms_norm

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


def sum_outputs(form, tensors: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Sum, norm and the gradients of x, delta and weight, through both results."""
    x, delta, weight = (value.detach().requires_grad_() for value in tensors)
    results = form(x, delta, weight)
    found = torch.autograd.grad(
        results, (x, delta, weight), [g.to(y) for g, y in zip(grads, results, strict=True)]
    )
    return [*(value.detach() for value in results), *found]


def exact_sum(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + delta, exact(x + delta, weight, eps=1e-5)


def of_sum(form):
    return lambda x, delta, weight: form(x, delta, weight=weight, eps=1e-5)


@pytest.mark.parametrize("shape", [(7, 300), (3, 5, 24), (401, 32)], ids=str)
@pytest.mark.parametrize("form", [naive.add_rms_norm, fused.add_rms_norm], ids=["naive", "fused"])
def test_a_sum_its_norm_and_their_gradients_are_the_formulas(form, shape: tuple[int, ...]) -> None:
    x, weight, grad = inputs(shape)
    delta, grad_total = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    tensors, grads = [x, delta, weight], (grad_total, grad)
    expected = sum_outputs(exact_sum, tensors, grads)
    found = sum_outputs(of_sum(form), [value.float() for value in tensors], grads)
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert (value.double() - reference).norm() <= 2e-6 * reference.norm()


def test_a_sums_norm_has_the_bits_of_the_separate_operations() -> None:
    """Forward; views with rows apart too."""
    x, delta = torch.randn(2, 5, 120, device=DEVICE)[..., :100].unbind()
    weight = torch.randn(100, device=DEVICE)
    total, y = fused.add_rms_norm(x, delta, weight=weight, eps=1e-5)
    assert torch.equal(total, x + delta)
    assert torch.equal(y, fused.rms_norm(x + delta, weight, eps=1e-5))


@pytest.mark.parametrize("reads", [(True, False), (False, True)], ids=["sum", "norm"])
def test_a_result_that_is_not_read_has_no_part_in_the_gradient(reads: tuple[bool, bool]) -> None:
    x, weight, grad = inputs((4, 50))
    tensors = [value.float() for value in (x, 2 * x.flip(0), weight)]
    grads = tuple(grad if read else torch.zeros_like(grad) for read in reads)
    expected = sum_outputs(exact_sum, [value.double() for value in tensors], grads)[2:]
    leaves = [value.requires_grad_() for value in tensors]
    result = of_sum(fused.add_rms_norm)(*leaves)[reads.index(True)]
    found = torch.autograd.grad(result, leaves, grad.float(), allow_unused=True)
    assert (found[2] is None) == reads[0]
    for value, reference in zip(found, expected, strict=True):
        assert value is None or (value.double() - reference).norm() <= 2e-6 * reference.norm()


@pytest.mark.parametrize("form", [naive.add_rms_norm, fused.add_rms_norm], ids=["naive", "fused"])
def test_a_stream_in_fp32_takes_what_is_added_in_bf16(form) -> None:
    """Both terms' gradients in their dtype; exact in bf16 here, whose rounding the interpreter lacks."""
    x, delta = torch.randn(3, 40, device=DEVICE), torch.randint(-9, 9, (3, 40), device=DEVICE).bfloat16()
    x.requires_grad_(), delta.requires_grad_()
    total, y = form(x, delta, weight=torch.ones(40, device=DEVICE), eps=1e-5)
    assert total.dtype == y.dtype == torch.float32
    assert torch.equal(total, x + delta)
    ones = torch.ones_like(total)
    grad_x, grad_delta = torch.autograd.grad(total, (x, delta), ones)
    assert (grad_x.dtype, grad_delta.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(grad_x, ones)
    assert torch.equal(grad_delta.float(), ones)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(300, 6144), (3, 16384)], ids=str)
def test_a_sum_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The forward's bits are those of two operations; gradients are rounded once."""
    x, weight, grad = inputs(shape)
    delta, grad_total = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    tensors = [*(value.to(dtype) for value in (x, delta)), weight.float()]
    grads = (grad_total.to(dtype), grad.to(dtype))
    found = sum_outputs(of_sum(add_rms_norm), tensors, grads)
    total = tensors[0] + tensors[1]
    assert torch.equal(found[0], total)
    assert torch.equal(found[1], rms_norm(total, tensors[2], eps=1e-5))
    zero, wide = torch.zeros_like(total).double(), [value.double() for value in grads]
    expected = sum_outputs(exact_sum, [total.double(), zero, weight], tuple(wide))[2:]
    for value, reference in zip(found[2:], expected, strict=True):
        assert error(value, reference) < TOLERANCE[dtype]


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
