"""Every form of the losses' terms gives the definition's sums and gradient."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels import kl
from hrwkv.kernels.kl import fused, inplace_torch, naive

# One tile and less, a few columns more than a tile, and a width that no vector load divides.
WIDTHS = [1, 37, 4096 + 16, 2 * 4096 + 3]
FORMS = [
    pytest.param(inplace_torch.distillation_terms, "cpu", id="inplace-torch"),
    pytest.param(fused.distillation_terms, "cpu", id="fused"),
    pytest.param(fused.distillation_terms, "cuda", id="fused-gpu", marks=pytest.mark.gpu),
    pytest.param(kl.distillation_terms, "cpu", id="chosen"),
    pytest.param(kl.distillation_terms, "cuda", id="chosen-gpu", marks=pytest.mark.gpu),
]
WEIGHTS = pytest.mark.parametrize(
    ("kl_scale", "ce_scale"), [(0.25, 0.0), (0.0, 0.5), (0.25, 0.5)], ids=["kl", "ce", "both"]
)


def logits(positions: int, vocab: int, *, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """A student near its teacher, as in training; a common offset must not matter."""
    teacher = spread * torch.randn(positions, vocab)
    return teacher + 0.3 * torch.randn(positions, vocab) + 20, teacher


def labels_for(positions: int, vocab: int) -> Tensor:
    labels = torch.randint(vocab, (positions,))
    labels[::3] = -100
    return labels


def close(got: Tensor, expected: Tensor, *, tolerance: float) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(("form", "device"), FORMS)
@pytest.mark.parametrize("vocab", WIDTHS)
@WEIGHTS
def test_sums_and_gradient_are_the_definitions(
    form, device: str, vocab: int, kl_scale: float, ce_scale: float
) -> None:
    student, teacher = logits(5, vocab)
    labels = labels_for(5, vocab)
    options = {"kl_scale": kl_scale, "ce_scale": ce_scale}
    sums, gradient = naive.distillation_terms(
        student.double(), teacher.double(), labels=labels, gradient_dtype=torch.float64, **options
    )
    got_sums, got_gradient = form(
        *(x.to(device, copy=True) for x in (student, teacher)),
        labels=labels.to(device),
        gradient_dtype=torch.float32,
        **options,
    )
    assert got_sums.dtype == got_gradient.dtype == torch.float32
    assert got_sums[1] == sums[1]
    # Exponentials and logits of order 20 in fp32; the sums of a vocabulary of one are exactly 0.
    torch.testing.assert_close(got_sums.double().cpu(), sums, atol=2e-5, rtol=5e-6)
    torch.testing.assert_close(got_gradient.double().cpu(), gradient, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("form", "device"), FORMS)
def test_the_gradient_has_the_dtype_that_was_asked_for(form, device: str) -> None:
    student, teacher = logits(3, 40)
    options = {"labels": None, "kl_scale": 1.0, "ce_scale": 0.0}
    _, expected = naive.distillation_terms(
        student.double(), teacher.double(), gradient_dtype=torch.float64, **options
    )
    inputs = [x.to(device) for x in (student, teacher)]
    _, gradient = form(*(x.clone() for x in inputs), gradient_dtype=torch.bfloat16, **options)
    assert gradient.dtype == torch.bfloat16
    close(gradient.cpu(), expected, tolerance=2**-8)  # half a unit in the last place of bf16
    sums, gradient = form(*(x.clone() for x in inputs), gradient_dtype=None, **options)
    assert gradient is None
    assert sums[2:].tolist() == [0, 0]


@pytest.mark.parametrize(("form", "device"), FORMS)
def test_equal_models_have_no_kl_and_agree(form, device: str) -> None:
    _, teacher = logits(4, 300)
    sums, gradient = form(
        teacher.to(device, copy=True),
        teacher.to(device, copy=True),
        labels=None,
        kl_scale=1.0,
        ce_scale=0.0,
        gradient_dtype=torch.float32,
    )
    assert sums.tolist() == [0, 4, 0, 0]
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(("form", "device"), FORMS)
def test_sure_models_give_finite_terms(form, device: str) -> None:
    """Logits far apart underflow most probabilities; their terms are 0, not NaN."""
    student, teacher = (500 * torch.eye(3, 70) for _ in range(2))
    student[1] = student[1].roll(9)
    sums, gradient = form(
        student.to(device, copy=True),
        teacher.to(device, copy=True),
        labels=torch.tensor([0, 1, -100], device=device),
        kl_scale=1.0,
        ce_scale=1.0,
        gradient_dtype=torch.float32,
    )
    assert sums.tolist() == [500, 2, 500, 0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("form", "device"), FORMS)
def test_no_positions_give_zeros(form, device: str) -> None:
    empty = torch.empty(0, 7, device=device)
    sums, gradient = form(
        empty, empty.clone(), labels=None, kl_scale=1.0, ce_scale=0.0, gradient_dtype=torch.float32
    )
    assert sums.tolist() == [0] * 4
    assert gradient.shape == (0, 7)


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_bits() -> None:
    student, teacher = (x.cuda() for x in logits(300, 32000))
    labels = labels_for(300, 32000).cuda()
    runs = [
        kl.distillation_terms(
            student, teacher, labels=labels, kl_scale=1.0, ce_scale=0.5, gradient_dtype=torch.bfloat16
        )
        for _ in range(5)
    ]
    for sums, gradient in runs[1:]:
        assert torch.equal(sums, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": torch.zeros(3, 9)}, r"shapes \[3, 8\] and \[3, 9\]"),
        ({"teacher": torch.zeros(3, 8).double()}, "float32 and torch.float64"),
        ({"student": torch.zeros(3, 8).bfloat16(), "teacher": torch.zeros(3, 8).bfloat16()}, "bfloat16"),
        ({"labels": torch.zeros(2)}, r"labels have shape \[2\], expected \[3\]"),
        ({"ce_scale": 0.5}, "no labels were given"),
    ],
    ids=["shape", "dtypes", "narrow", "labels", "no-labels"],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {
        "student": torch.zeros(3, 8),
        "teacher": torch.zeros(3, 8),
        "labels": None,
        "kl_scale": 1.0,
        "ce_scale": 0.0,
        "gradient_dtype": None,
    }
    with pytest.raises(ValueError, match=message):
        kl.distillation_terms(**(arguments | changes))
