"""The Triton rows against naive's.

Triton's interpreter rounds to 8 bits wrongly (a carry out of the mantissa is lost), so without a GPU the rows
are compared as they are before they are rounded.
"""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels.matmul import naive

fused = pytest.importorskip("hrwkv.kernels.matmul.fused")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU, Triton's interpreter
WIDTHS = [1, 300, 2048, 4500]


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms store rows divided by their scale, in fp32."""
    monkeypatch.setattr(fused, "ROUNDED", torch.float32)

    def rows(x: Tensor, *, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if columns is None else x * columns
        largest = x.abs().amax(-1)
        scale = torch.where(largest > 0, largest / 448, 1.0)
        return x / scale.unsqueeze(-1), scale

    monkeypatch.setattr(naive, "quantise_rows", rows)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape
        # Scaled rows reach 448; exp differs in its last bits.
        torch.testing.assert_close(value, reference, atol=1e-3, rtol=1e-5)


def inputs(width: int) -> tuple[Tensor, ...]:
    """Gradient, gate, up [5, width] with a row of zeros, and two rows of columns."""
    x = torch.randn(3, 5, width, device=DEVICE)
    x[:, 3] = 0
    return *x, *torch.rand(2, width, device=DEVICE)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_naives(width: int) -> None:
    grad, gate, up, first, second = inputs(width)
    assert_same(fused.quantise_rows(gate), naive.quantise_rows(gate))
    assert_same(fused.quantise_rows(gate, columns=first), naive.quantise_rows(gate, columns=first))
    assert_same(fused.swiglu_rows(gate, up), naive.swiglu_rows(gate, up))
    columns = {"gate_columns": first, "up_columns": second}
    assert_same(
        fused.swiglu_gradient_rows(grad, gate, up, **columns),
        naive.swiglu_gradient_rows(grad, gate, up, **columns),
    )


@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (64, 64), (3, 200)], ids=str)
def test_transpose(shape: tuple[int, int]) -> None:
    values = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    turned = fused.transpose(values.view(torch.float8_e4m3fn)).view(torch.int8)
    assert turned.is_contiguous()
    assert torch.equal(turned, values.T)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [300, 19648])
def test_rounded_rows_on_a_gpu(width: int) -> None:
    grad, gate, up, first, second = inputs(width)
    found = fused.quantise_rows(gate, columns=first)
    expected = naive.quantise_rows(gate, columns=first)
    assert torch.equal(found[1], expected[1])
    assert (
        found[0].float() != expected[0].float()
    ).float().mean() < 1e-3  # ties, after an approximate division
    columns = {"gate_columns": first, "up_columns": second}
    for mine, theirs in [
        (fused.swiglu_rows(gate, up), naive.swiglu_rows(gate, up)),
        (
            fused.swiglu_gradient_rows(grad, gate, up, **columns),
            naive.swiglu_gradient_rows(grad, gate, up, **columns),
        ),
    ]:
        for value, reference in zip(mine, theirs, strict=True):
            value, reference = value.float(), reference.float()
            assert (value - reference).norm() < 5e-3 * reference.norm()
