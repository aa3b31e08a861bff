"""``merge_weight`` of hrwkv/convert/adapters.py against the formulas, number by number in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrwkv.convert.adapters import merge_weight, needs_scaling

SCALING = 0.7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def parts_for(kind: str, weight: Tensor, *, rank: int = 3, seed: int = 0) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    if kind == "bone":
        return {"bone": normal(inputs // 8, 8, 8, seed=seed)}
    parts = {"lora_A": normal(rank, inputs, seed=seed), "lora_B": normal(outputs, rank, seed=seed + 1)}
    if kind == "dora":
        parts["lora_M"] = weight.float().norm(dim=0, keepdim=True) + normal(1, inputs, seed=seed + 2)
    return parts


@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), rank=st.integers(1, 5), scaling=st.floats(-3, 3))
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_low_rank_parts_follow_the_formula(
    kind: str, outputs: int, inputs: int, rank: int, scaling: float
) -> None:
    weight = normal(outputs, inputs, seed=outputs)
    parts = parts_for(kind, weight, rank=rank, seed=inputs)
    expected = weight.double()
    for i in range(outputs):
        for j in range(inputs):
            products = [parts["lora_B"][i, k].double() * parts["lora_A"][k, j].double() for k in range(rank)]
            expected[i, j] += scaling * sum(products)
    merged = merge_weight(weight, parts, scaling=scaling).double()
    if kind == "dora":  # times the norms again: cancellation makes some so small that dividing hides errors
        merged = merged * (expected.square().sum(0).sqrt() + 1e-6)
        expected = expected * parts["lora_M"].double()
    torch.testing.assert_close(merged, expected, atol=3e-6, rtol=1e-5)


def test_dora_divides_by_the_norm_and_its_epsilon() -> None:
    """Columns of 0, of the epsilon's size, and of norm 5: M * W / (norm + 1e-6)."""
    weight = torch.tensor([[0.0, 1e-6, 3.0], [0.0, 0.0, 4.0]])
    parts = {
        "lora_A": torch.zeros(1, 3),
        "lora_B": torch.zeros(2, 1),
        "lora_M": torch.tensor([[2.0, 2.0, 2.0]]),
    }
    expected = torch.tensor([[0.0, 1.0, 1.2], [0.0, 0.0, 1.6]])
    torch.testing.assert_close(merge_weight(weight, parts, scaling=1.0), expected, atol=0, rtol=1e-6)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), rank=st.integers(1, 4))
def test_bone_follows_the_formula_block_by_block(rows: int, columns: int, rank: int) -> None:
    weight, bone = normal(rows * rank, columns * rank, seed=rows), normal(columns, rank, rank, seed=columns)
    expected = torch.empty(weight.shape, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            block = slice(i * rank, (i + 1) * rank), slice(j * rank, (j + 1) * rank)
            part = weight[block].double()
            expected[block] = part + part @ bone[j].double() + bone[j].double()
    merged = merge_weight(weight, {"bone": bone}, scaling=None)
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "bone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_fp32_whatever_is_stored(kind: str, dtype: torch.dtype) -> None:
    weight = normal(16, 24, seed=1).to(dtype)
    parts = {part: tensor.to(dtype) for part, tensor in parts_for(kind, weight).items()}
    merged = merge_weight(weight, parts, scaling=2.0)
    wide = {part: tensor.float() for part, tensor in parts.items()}
    assert torch.equal(merged, merge_weight(weight.float(), wide, scaling=2.0).to(dtype))
    assert needs_scaling(parts) == (kind != "bone")


def test_dora_takes_its_magnitudes_as_a_vector_too() -> None:
    weight = normal(6, 4, seed=3)
    parts = parts_for("dora", weight)
    flat = {**parts, "lora_M": parts["lora_M"].flatten()}
    assert torch.equal(
        merge_weight(weight, flat, scaling=SCALING), merge_weight(weight, parts, scaling=SCALING)
    )


WRONG_PARTS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "no-parts": ({}, "found no part, expected lora_A and lora_B"),
    "half": ({"lora_B": (16, 3)}, "found lora_B, expected lora_A and lora_B"),
    "magnitudes-alone": ({"lora_M": (1, 24)}, "found lora_M, expected"),
    "two-adapters": ({"lora_A": (3, 24), "lora_B": (16, 3), "bone": (3, 8, 8)}, "found bone, lora_A, lora_B"),
    "other-input": (
        {"lora_A": (3, 16), "lora_B": (16, 3)},
        r"lora_A has shape \[3, 16\], expected \[3, 24\]",
    ),
    "other-output": (
        {"lora_A": (3, 24), "lora_B": (24, 3)},
        r"\[24, 3\], expected \[16, 3\] for a weight of \[",
    ),
    "other-rank": ({"lora_A": (3, 24), "lora_B": (16, 4)}, r"lora_B has shape \[16, 4\], expected \[16, 3\]"),
    "scalar": ({"lora_A": (), "lora_B": (16, 3)}, r"lora_A has shape \[\], expected \[24\]"),
    "magnitudes-of-rows": (
        {"lora_A": (3, 24), "lora_B": (16, 3), "lora_M": (1, 16)},
        r"lora_M has shape \[1, 16\], expected \[1, 24\]",
    ),
    "bone-does-not-divide": ({"bone": (4, 6, 6)}, r"bone has shape \[4, 6, 6\], expected \[in / r, r, r\]"),
    "bone-of-rows": ({"bone": (2, 8, 8)}, r"divides both axes of the weight's \[16, 24\]"),
    "bone-empty": ({"bone": (0, 0, 0)}, r"bone has shape \[0, 0, 0\]"),
    "bone-flat": ({"bone": (24, 8)}, r"bone has shape \[24, 8\]"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_parts_that_do_not_fit_are_refused_with_their_shapes(case: str) -> None:
    shapes, says = WRONG_PARTS[case]
    with pytest.raises(ValueError, match=says):
        merge_weight(
            torch.zeros(16, 24), {part: torch.zeros(shape) for part, shape in shapes.items()}, scaling=1.0
        )


def test_weight_and_scaling_are_checked() -> None:
    parts = parts_for("lora", torch.zeros(16, 24))
    with pytest.raises(ValueError, match=r"the weight has shape \[16\], expected \[out, in\]"):
        merge_weight(torch.zeros(16), parts, scaling=1.0)
    with pytest.raises(ValueError, match=r"both 0\.5 .* and 2\.0 .* are in circulation"):
        merge_weight(torch.zeros(16, 24), parts, scaling=None)
    with pytest.raises(ValueError, match="scaling is nan, expected a finite number"):
        merge_weight(torch.zeros(16, 24), parts, scaling=float("nan"))
