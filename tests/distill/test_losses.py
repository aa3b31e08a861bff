"""The fused loss is the formula that autograd differentiates, and keeps nothing as wide as a vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.data.packing import IGNORED_LABEL
from hrwkv.distill.losses import Measures, chunk_positions, distillation_loss, measure

T, D, D_T, V = 23, 12, 16, 37


def example(dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(V, (T,), generator=generator)
    labels[[4, T - 1]] = IGNORED_LABEL
    return {
        "student_hidden": draw(T, D).requires_grad_(),
        "student_head": draw(V, D).requires_grad_(),
        "teacher_hidden": draw(T, D_T),
        "teacher_head": draw(V, D_T),
        "labels": labels,
    }


def dense(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor,
    kl_weight: float,
    ce_weight: float,
) -> Tensor:
    student = (student_hidden @ student_head.T).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    return kl_weight * kl + ce_weight * F.nll_loss(student, labels, ignore_index=IGNORED_LABEL)


def tensors(case: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case["student_hidden"], case["student_head"], case["teacher_hidden"], case["teacher_head"]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100], ids="chunk{}".format)
@pytest.mark.parametrize(
    ("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)], ids=["kl", "ce", "both"]
)
# fp64 is rounding alone; fp32 sums of 37 terms of order 10 have an error of about 1e-6.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_loss_and_gradients_equal_the_dense_formula(
    dtype: torch.dtype, tolerance: float, kl_weight: float, ce_weight: float, chunk_tokens: int
) -> None:
    case, reference = example(dtype), example(torch.float64)
    weights = {"kl_weight": kl_weight, "ce_weight": ce_weight}
    # Rounded inputs first, so that fp32 is compared with the exact result of the same numbers.
    for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head"):
        reference[name].data.copy_(case[name].detach())
    expected = dense(*tensors(reference), labels=reference["labels"], **weights)
    loss, _ = distillation_loss(*tensors(case), labels=case["labels"], chunk_tokens=chunk_tokens, **weights)
    (3 * expected).backward()
    (3 * loss).backward()
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
    for name in ("student_hidden", "student_head"):
        torch.testing.assert_close(
            case[name].grad.double(), reference[name].grad, atol=tolerance, rtol=tolerance
        )


def test_gradients_pass_the_finite_difference_check() -> None:
    case = {name: tensor[:6].detach() for name, tensor in example(torch.float64).items()}
    for name in ("student_hidden", "student_head"):
        case[name].requires_grad_()
    case["labels"].clamp_(max=5)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(
            hidden, head, case["teacher_hidden"], case["teacher_head"], labels=case["labels"], ce_weight=0.5,
            chunk_tokens=4,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (case["student_hidden"], case["student_head"]))


def test_sums_are_those_of_the_dense_distributions() -> None:
    case = example(torch.float64)
    case["student_hidden"].data[3:9] = case["teacher_hidden"][3:9, :D]
    case["student_head"].data.copy_(case["teacher_head"][:, :D])
    student = (case["student_hidden"] @ case["student_head"].T).log_softmax(-1)
    teacher = (case["teacher_hidden"] @ case["teacher_head"].T).log_softmax(-1)
    agreement = (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert 0 < agreement < T  # the case has both kinds
    expected = Measures(
        kl=(teacher.exp() * (teacher - student)).sum(),
        agreement=agreement,
        student_nll=F.nll_loss(student, case["labels"], ignore_index=IGNORED_LABEL, reduction="sum"),
        teacher_nll=F.nll_loss(teacher, case["labels"], ignore_index=IGNORED_LABEL, reduction="sum"),
    )
    got = measure(*tensors(case), labels=case["labels"])
    for name in ("kl", "agreement", "student_nll", "teacher_nll"):
        value = getattr(got, name)
        assert not value.requires_grad
        torch.testing.assert_close(value, getattr(expected, name).double())


def test_parts_with_global_counts_add_up_to_the_whole() -> None:
    whole, parts = example(torch.float64), example(torch.float64)
    options = {"kl_weight": 0.6, "ce_weight": 0.3, "chunk_tokens": 4}
    loss, _ = distillation_loss(*tensors(whole), labels=whole["labels"], **options)
    loss.backward()
    counts = {"num_tokens": T, "num_labels": int((whole["labels"] != IGNORED_LABEL).sum())}
    hidden, head, teacher_hidden, teacher_head = tensors(parts)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 9), slice(9, T)):
        piece, _ = distillation_loss(
            hidden[part],
            head,
            teacher_hidden[part],
            teacher_head,
            labels=parts["labels"][part],
            **counts,
            **options,
        )
        piece.backward()
        total += piece.detach()
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(hidden.grad, whole["student_hidden"].grad)
    torch.testing.assert_close(head.grad, whole["student_head"].grad)


@pytest.mark.parametrize("frozen", ["student_head", "student_hidden"])
def test_a_frozen_input_gets_no_gradient_and_none_is_kept_for_it(frozen: str) -> None:
    case = example(torch.float32)
    case[frozen].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss, _ = distillation_loss(*tensors(case))
    loss.backward()
    assert case[frozen].grad is None
    trained = "student_hidden" if frozen == "student_head" else "student_head"
    assert kept == [case[trained].shape]
    assert case[trained].grad.abs().sum() > 0


def test_nothing_as_wide_as_the_vocabulary_outlives_its_chunk() -> None:
    """What autograd saves is as wide as the hidden states; the widest tensor ever made is one chunk."""
    tokens, chunk, vocab = 64, 8, 1001
    hidden = torch.randn(tokens, D, requires_grad=True)
    head = torch.randn(vocab, D, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(tokens, D), torch.randn(vocab, D)
    saved: list[torch.Size] = []

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and vocab in out.shape and D not in out.shape:
                self.elements = max(self.elements, out.numel())
            return out

    with (
        Widest() as widest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x),
    ):
        loss, _ = distillation_loss(hidden, head, teacher_hidden, teacher_head, chunk_tokens=chunk)
        loss.backward()
    assert widest.elements == chunk * vocab
    assert sorted(saved) == sorted([hidden.shape, head.shape])


def test_chunk_follows_the_width_of_the_vocabulary() -> None:
    device = torch.device("cpu")
    small, large = chunk_positions(1000, device), chunk_positions(2000, device)
    assert small // 2 <= large <= small // 2 + 1
    assert chunk_positions(10**9, device) == 16


def test_cross_entropy_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="no labels were given"):
        distillation_loss(*tensors(example(torch.float32)), ce_weight=0.5)
