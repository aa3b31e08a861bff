"""Both forms of ``expand`` against its formula in fp64."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.low_rank import expand, naive

fused = pytest.importorskip("hrwkv.kernels.low_rank.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, Triton's interpreter
ACTIVATIONS = ("tanh", "none", "sigmoid", "none", "none")
# Ranks and widths below, at and above a tile, most of them no multiple of anything.
SHAPES = ((5, 70), (64, 64), (130, 33), (1, 128), (65, 1))
# fp32: sums of up to 130 products. bf16: the activation and the result are rounded, the sum is not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def exact(inner: list[Tensor], up: list[Tensor]) -> list[Tensor]:
    functions = {"tanh": torch.tanh, "sigmoid": lambda x: 1 / (1 + (-x).exp()), "none": lambda x: x}
    return [
        functions[name](x.double()) @ w.double() for x, w, name in zip(inner, up, ACTIVATIONS, strict=True)
    ]


def inputs(
    tokens: int, shapes=SHAPES, *, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Inner products as parts of a wider one, whose other columns are NaN, and the second factors."""
    ranks = [rank for rank, _ in shapes]
    wide = torch.full((tokens, sum(ranks) + 2), torch.nan, device=DEVICE)
    wide[:, 1:-1] = 2 * torch.randn(tokens, sum(ranks), device=DEVICE)
    inner = list(wide.to(dtype)[:, 1:-1].split(ranks, dim=-1))
    return inner, [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def half(inner: list[Tensor], up: list[Tensor], *, activations) -> list[Tensor]:
    """As half precision is cut."""
    launch = fused.choose_launch(len(inner[0]), itemsize=2)
    return fused.expand(inner, up, activations=activations, launch=launch)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 65, 257])
@pytest.mark.parametrize("form", [naive.expand, fused.expand, half], ids=["naive", "fused", "half"])
def test_each_product_is_its_formula(form, tokens: int) -> None:
    inner, up = inputs(tokens)
    for found, expected in zip(form(inner, up, activations=ACTIVATIONS), exact(inner, up), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() < TOLERANCE[torch.float32] * expected.norm()


def test_weights_may_lie_transposed() -> None:
    inner, up = inputs(3)
    turned = [w.t().contiguous().t() for w in up]
    for found, expected in zip(
        fused.expand(inner, turned, activations=ACTIVATIONS), exact(inner, up), strict=True
    ):
        assert (found - expected).norm() < TOLERANCE[torch.float32] * expected.norm()


def test_gradients_reach_both_factors() -> None:
    (inner, *_), (up, *_) = inputs(3)
    inner, up = inner.clone().requires_grad_(), up.requires_grad_()
    (y,) = expand([inner], [up], activations=["tanh"])
    y.sum().backward()
    slope = 1 - torch.tanh(inner.detach()).square()
    torch.testing.assert_close(inner.grad, slope * up.detach().sum(1))
    torch.testing.assert_close(up.grad, torch.tanh(inner.detach()).sum(0)[:, None].expand(up.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 64, 65, 257])
@torch.no_grad()
def test_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    shapes = ((128, 6144), (96, 6144), (320, 6144), (64, 1024), (64, 1024))
    inner, up = inputs(tokens, shapes, dtype=dtype)
    for found, expected in zip(expand(inner, up, activations=ACTIVATIONS), exact(inner, up), strict=True):
        assert (found - expected).norm() < TOLERANCE[dtype] * expected.norm()
