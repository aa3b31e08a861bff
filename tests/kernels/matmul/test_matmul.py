"""Products with 8-bit weights against the same weights widened to fp64, forward and gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrwkv.kernels.matmul import (
    FrozenWeight,
    dequantise,
    frozen_linear,
    frozen_swiglu,
    naive,
    quantise,
    rounds_inputs,
)

DTYPES = [torch.float8_e4m3fn, torch.int8]
SIZES = [(20, 48, 80), (1, 16, 16), (7, 13, 5)]  # T, D, I


def random_weight(rows: int, columns: int, dtype: torch.dtype) -> FrozenWeight:
    """Rows of very different size, one of zeros."""
    size = torch.logspace(-3, 1, rows).unsqueeze(-1)
    size[rows // 2] = 0
    return quantise(torch.randn(rows, columns) * size * columns**-0.5, dtype)


def mlp_weights(width: int, inner: int, dtype: torch.dtype) -> tuple[FrozenWeight, ...]:
    return tuple(random_weight(*shape, dtype) for shape in [(inner, width), (inner, width), (width, inner)])


def dense_swiglu(x: Tensor, *weights: FrozenWeight) -> Tensor:
    gate, up, down = (dequantise(weight, x.dtype) for weight in weights)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def with_gradient(form, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = form(x)
    return y.detach(), torch.autograd.grad(y, x, grad.to(y))[0]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_a_rounded_weight_is_near_and_rounding_it_again_changes_nothing(
    rows: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(1, generator=generator)
    rounded = quantise(weight, dtype)
    wide = dequantise(rounded, torch.float64)
    scale = rounded.scales.double().unsqueeze(-1)
    # int8: half a step. e4m3: half of its last bit, 2^-4 of the number, or half of the smallest step, 2^-10.
    allowed = scale / 2 if dtype == torch.int8 else torch.maximum(weight.abs() * 2**-4, scale * 2**-10)
    assert ((wide - weight).abs() <= allowed * (1 + 1e-5)).all()
    again = quantise(wide, dtype)
    assert torch.equal(again.values.float(), rounded.values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_widened_weight_is_rounded_once(dtype: torch.dtype) -> None:
    weight = random_weight(6, 40, torch.float8_e4m3fn)
    assert torch.equal(dequantise(weight, dtype), dequantise(weight, torch.float64).to(dtype))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dtype is torch.float16, expected torch.float8_e4m3fn or torch.int8"
    ):
        quantise(torch.ones(2, 2), torch.float16)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_and_gradients_are_those_of_the_widened_weight(
    dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    tokens, width, inner = sizes
    x, grad = torch.randn(2, tokens, width, dtype=torch.float64)
    weights = mlp_weights(width, inner, dtype)
    square = random_weight(width, width, dtype)
    expected = with_gradient(lambda x: x @ dequantise(square, x.dtype).T, x, grad)
    torch.testing.assert_close(with_gradient(lambda x: frozen_linear(x, square), x, grad), expected)
    expected = with_gradient(lambda x: dense_swiglu(x, *weights), x, grad)
    for recompute in (False, True):
        found = with_gradient(lambda x, r=recompute: frozen_swiglu(x, *weights, recompute=r), x, grad)
        torch.testing.assert_close(found, expected)


def test_products_in_8_bits_are_those_of_rounded_rows() -> None:
    """Forward: x rounded. Backward: the gradient times the weight's scales rounded, then the bare values."""
    x, grad = torch.randn(2, 9, 32)
    weight = random_weight(32, 32, torch.float8_e4m3fn)
    y, grad_x = with_gradient(lambda x: frozen_linear(x, weight, in_8_bits=True), x, grad)
    rounded = dequantise(quantise(x, torch.float8_e4m3fn), torch.float64)
    assert error(y, rounded @ dequantise(weight, torch.float64).T) < 1e-6  # fp32 sums
    rounded = dequantise(quantise(grad * weight.scales, torch.float8_e4m3fn), torch.float64)
    assert error(grad_x, rounded @ weight.values.double()) < 1e-6


def test_an_mlp_in_8_bits_is_near_and_recomputes_the_same_bits() -> None:
    x, grad = torch.randn(2, 40, 64)
    weights = tuple(
        quantise(torch.randn(shape) * shape[1] ** -0.5, torch.float8_e4m3fn)
        for shape in [(96, 64), (96, 64), (64, 96)]
    )
    kept, again = (
        with_gradient(lambda x, r=recompute: frozen_swiglu(x, *weights, recompute=r, in_8_bits=True), x, grad)
        for recompute in (False, True)
    )
    assert all(map(torch.equal, kept, again))
    exact = with_gradient(lambda x: dense_swiglu(x, *weights), x.double(), grad)
    # One rounding of e4m3 is 2.6 % of the norm; x and the inner product are rounded, and both ways back.
    assert 0.01 < error(kept[0], exact[0]) < 0.06
    assert 0.01 < error(kept[1], exact[1]) < 0.06


def test_gradient_rows_in_e4m3_have_half_the_error_of_e5m2() -> None:
    """Why one dtype serves both directions: with a scale a row, e5m2's range buys nothing."""
    grad = torch.randn(64, 512) * torch.logspace(-8, 0, 64).unsqueeze(-1)
    largest = grad.abs().amax(-1, keepdim=True)
    e5m2 = (grad / largest * 57344).to(torch.float8_e5m2).float() * largest / 57344
    e4m3 = dequantise(quantise(grad, torch.float8_e4m3fn), torch.float32)
    assert error(e4m3, grad) < 0.6 * error(e5m2, grad)


def test_a_cpu_widens_weights() -> None:
    assert not rounds_inputs(random_weight(16, 16, torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("hip", "capability", "rounds"), [(None, (9, 0), True), (None, (8, 9), False), ("6.4", (9, 4), False)]
)
def test_only_a_chip_that_multiplies_these_floats_rounds_inputs(
    hip: str | None, capability: tuple[int, int], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MI300X calls itself 9.4, above Hopper's 9.0, but its 8-bit floats are others."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    values = SimpleNamespace(is_cuda=True, dtype=torch.float8_e4m3fn, shape=(16, 32), device="cuda")
    assert rounds_inputs(FrozenWeight(values, torch.ones(16))) == rounds


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [96, 19648], ids=["small", "reka"])
def test_a_gpu_computes_what_the_definition_says(inner: int) -> None:
    """Products by the chip's 8-bit units against naive's; sizes that it cannot multiply are widened."""
    x, grad = torch.randn(2, 100, 256, device="cuda").bfloat16()
    cpu = tuple(
        quantise(torch.randn(shape) * shape[1] ** -0.5, torch.float8_e4m3fn)
        for shape in [(inner, 256), (inner, 256), (256, inner)]
    )
    gpu = tuple(FrozenWeight(*(part.cuda() for part in weight)) for weight in cpu)
    can = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    assert rounds_inputs(gpu[0]) == can
    own = rounds_inputs(gpu[0])
    exact, in_fp32, in_bf16 = (
        with_gradient(form, x.cpu().to(dtype), grad.cpu())
        for form, dtype in [
            (lambda x: dense_swiglu(x, *cpu), torch.float64),
            (lambda x: frozen_swiglu(x, *cpu, in_8_bits=own), torch.float32),
            (lambda x: frozen_swiglu(x, *cpu, in_8_bits=own), torch.bfloat16),
        ]
    )
    for recompute in (False, True):
        found = with_gradient(lambda x, r=recompute: frozen_swiglu(x, *gpu, recompute=r), x, grad)
        for value, true, precise, rounded in zip(found, exact, in_fp32, in_bf16, strict=True):
            # bf16 between the products moves elements over e4m3's edges, here and in the definition alike.
            assert error(value.cpu(), precise) < 1.25 * error(rounded, precise)
            assert error(value.cpu(), true) < 1.05 * error(rounded, true)


def test_naive_scaled_product_is_the_product_of_widened_rows() -> None:
    left, right = quantise(torch.randn(5, 24), torch.float8_e4m3fn), random_weight(7, 24, torch.float8_e4m3fn)
    expected = dequantise(left, torch.float64) @ dequantise(right, torch.float64).T
    assert error(naive.scaled_product(*left, *right), expected) < 1e-6
