"""Both forms of ``silu(gate) * up`` against its formula in fp64, forward and gradients."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.swiglu import naive, swiglu, swiglu_gradients

fused = pytest.importorskip("hrwkv.kernels.swiglu.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, Triton's interpreter
# Each element by itself, in its own parts: fp32 a few operations, bf16 one rounding, half of its last bit.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
# Below, at and above a block, and rows that fill several.
SHAPES = [(1, 1), (3, 300), (2, 1024), (5, 2500)]


def exact(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def outputs(form, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = form(gate, up)
    return y.detach(), *torch.autograd.grad(y, (gate, up), grad)


def inputs(shape: tuple[int, int], *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gate, up and a gradient, at both ends of the exponential too: views of a wide tensor, NaN between."""
    rows, width = shape
    wide = torch.full((rows, 3 * width + 2), torch.nan, device=DEVICE, dtype=dtype)
    wide[:, 1:-1] = 3 * torch.randn(rows, 3 * width, device=DEVICE)
    gate, up, grad = wide[:, 1:-1].split(width, dim=-1)
    gate[0, 0], gate[-1, -1] = -100.0, 100.0  # exp(100) is infinite in fp32
    return [gate, up, grad]


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, tolerance: float) -> None:
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        assert value.is_contiguous()
        error = (value.double() - reference).abs()
        assert (error <= tolerance * reference.abs() + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [naive.swiglu, fused.swiglu], ids=["naive", "fused"])
def test_product_and_gradients_are_the_formulas(form, shape: tuple[int, int]) -> None:
    rows = inputs(shape)
    expected = outputs(exact, *(x.double() for x in rows))
    assert_near(outputs(form, *rows), expected, tolerance=2e-6)


def test_columns_may_lie_apart() -> None:
    rows = [x.t().contiguous().t() for x in inputs((4, 70))]
    assert_near(outputs(fused.swiglu, *rows), outputs(exact, *(x.double() for x in rows)), tolerance=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_naive_rounds_once(dtype: torch.dtype) -> None:
    gate, up, grad = (x.to(dtype) for x in inputs((3, 40)))
    wide = torch.promote_types(dtype, torch.float32)
    expected = outputs(naive.swiglu, *(x.to(wide) for x in (gate, up, grad)))
    found = outputs(naive.swiglu, gate, up, grad)
    assert all(torch.equal(y, x.to(dtype)) for x, y in zip(expected, found, strict=True))


def test_naive_gradients_are_autograds() -> None:
    gate, up, grad = (x.double() for x in inputs((3, 30)))
    expected = outputs(exact, gate, up, grad)[1:]
    torch.testing.assert_close(naive.swiglu_gradients(grad, gate, up), expected)


def test_gradients_alone_are_the_functions() -> None:
    gate, up, grad = inputs((3, 1100))
    expected = outputs(fused.swiglu, gate, up, grad)[1:]
    assert all(map(torch.equal, fused.swiglu_gradients(grad, gate, up), expected))


def test_a_cpu_takes_the_definition() -> None:
    gate, up, grad = (x.cpu() for x in inputs((2, 5)))
    with patch.object(naive, "swiglu", lambda *pair: "naive"):
        assert swiglu(gate, up) == "naive"
    for mine, theirs in zip(
        swiglu_gradients(grad, gate, up), naive.swiglu_gradients(grad, gate, up), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 19648), (256, 19648), (1000, 100)], ids=str)
def test_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = inputs(shape, dtype=dtype)
    expected = outputs(exact, *(x.double() for x in rows))
    assert_near(outputs(swiglu, *rows), expected, tolerance=TOLERANCE[dtype] + 3e-6)


@pytest.mark.gpu
def test_no_rows_and_fp64_on_a_gpu() -> None:
    gate, up, _ = inputs((3, 20))
    assert swiglu(gate[:0], up[:0]).shape == (0, 20)
    torch.testing.assert_close(swiglu(gate.double(), up.double()), exact(gate.double(), up.double()))
