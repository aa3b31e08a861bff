"""Steps against the loss that they stand for, written out with autograd on the whole model."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hrwkv.distill.optimiser import build_optimiser
from hrwkv.distill.parallel import Ranks
from hrwkv.distill.stages import (
    STAGES,
    StepInput,
    StepOptions,
    align_step,
    check_pair,
    distill_step,
    set_trainable,
    split_rows,
    trains,
)
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.config import FULL, LINEAR
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import StageSettings
from tests.builders import hybrid_config

UNREAD = hybrid_config().unread_parameters
ALONE = Ranks(0, 1, torch.device("cpu"))
LENGTHS = (7, 1, 12, 4)
Pair = Callable[..., tuple[HybridModel, HybridModel]]


def step_input(seed: int = 3) -> StepInput:
    ids = torch.randint(257, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    return StepInput(ids, TokenBatch.from_lengths(LENGTHS), sum(LENGTHS), sum(LENGTHS) - len(LENGTHS))


def gradients(model: HybridModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joint_align_loss(teacher: HybridModel, student: HybridModel, inputs: StepInput) -> Tensor:
    """Hxa079.md (23) over all layers in one graph; first values cut off from it."""
    rope, hidden, first, losses = teacher.model.rope(inputs.batch), None, None, []
    hidden = teacher.model.embed_tokens(inputs.token_ids)
    for block, own in zip(teacher.model.layers, student.model.layers, strict=True):
        x = block.input_layernorm(hidden)
        target, _ = block.mix(x, inputs.batch, rope)
        y, first = own.mix(x, inputs.batch, rope, first)
        first = tuple(value.detach() for value in first)
        losses.append((y - target).square().sum() / target.square().sum())
        hidden = block.feed_forward(hidden, target)
    return torch.stack(losses).mean()


def test_alignment_layer_by_layer_has_the_gradients_of_the_joint_loss(make_pair: Pair) -> None:
    teacher, student = make_pair()
    set_trainable(student, stage=STAGES[1], mode="all")
    result = align_step(teacher, student, step_input(), StepOptions(ALONE))
    stepwise = gradients(student)
    student.zero_grad()
    loss = joint_align_loss(teacher, student, step_input())
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.layer_loss.mean(), loss.detach())
    joint = gradients(student)
    assert stepwise.keys() == joint.keys()
    torch.testing.assert_close(stepwise, joint)
    # Every mixer parameter that is read has a gradient, the kept attention layer's too.
    assert stepwise.keys() == {
        n for n, _ in student.named_parameters() if trains(n, stage=STAGES[1], mode="all", unread=UNREAD)
    }
    assert all(gradient.abs().sum() > 0 for gradient in stepwise.values())


def test_alignment_keeps_one_layer_of_activations(make_pair: Pair) -> None:
    """What autograd holds at its worst is one layer's: less than half of the joint graph's four."""
    teacher, student = make_pair()
    set_trainable(student, stage=STAGES[1], mode="all")
    alive, peak = [0], [0]

    class Kept:
        def __init__(self, x: Tensor) -> None:
            self.x = x
            alive[0] += x.numel()
            peak[0] = max(peak[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= self.x.numel()

    peaks = []
    for run in (
        lambda: align_step(teacher, student, step_input(), StepOptions(ALONE)),
        lambda: joint_align_loss(teacher, student, step_input()).backward(),
    ):
        alive[0] = peak[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            run()
        peaks.append(peak[0])
    assert 0 < peaks[0] < peaks[1] / 2


def residual_stream(model: HybridModel, inputs: StepInput) -> list[Tensor]:
    """The stream after each block, by the blocks alone."""
    hidden, first, stream = model.model.embed_tokens(inputs.token_ids), None, []
    for block in model.model.layers:
        hidden, delta, first = block(hidden, inputs.batch, model.model.rope(inputs.batch), first)
        hidden = hidden + delta
        stream.append(hidden)
    return stream


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("ce_weight", "hidden_weight"), [(0.0, 0.0), (0.5, 0.0), (0.0, 3.0)], ids=["kl", "kl+ce", "kl+hidden"]
)
def test_distillation_has_the_gradients_of_the_dense_loss(
    make_pair: Pair, tied: bool, ce_weight: float, hidden_weight: float
) -> None:
    """Those through the first layer's key and value included: nothing is detached in the student."""
    teacher, student = make_pair(tied=tied)
    set_trainable(student, stage=STAGES[2], mode="all")
    inputs = step_input()
    options = StepOptions(ALONE, ce_weight=ce_weight, hidden_weight=hidden_weight)
    result = distill_step(teacher, student, inputs, options)
    fused = gradients(student)
    student.zero_grad()
    theirs, ours = residual_stream(teacher, inputs), residual_stream(student, inputs)
    target = teacher.compute_logits(teacher.model.norm(theirs[-1])).log_softmax(-1)
    own = student.compute_logits(student.model.norm(ours[-1])).log_softmax(-1)
    kl = (target.exp() * (target - own)).sum(-1).mean()
    inside = torch.ones(len(inputs.token_ids), dtype=torch.bool)
    inside[inputs.batch.cu_seqlens[1:] - 1] = False
    nll = -own[inside].gather(-1, inputs.token_ids.roll(-1)[inside].unsqueeze(-1)).mean()
    errors = [(x - y).square().sum() / y.square().sum().detach() for x, y in zip(ours, theirs, strict=True)]
    loss = kl + ce_weight * nll + hidden_weight * sum(errors) / len(errors)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.kl, kl.detach())
    torch.testing.assert_close(result.agreement, (own.argmax(-1) == target.argmax(-1)).float().mean())
    dense = gradients(student)
    assert fused.keys() == {
        n for n, _ in student.named_parameters() if trains(n, stage=STAGES[2], mode="all", unread=UNREAD)
    }
    # fp32 gradients of one another through four layers: relative to their own size.
    for name, gradient in fused.items():
        assert (gradient - dense[name]).norm() < 1e-5 * dense[name].norm() + 1e-9, name


def micro_batches(cut: int) -> list[StepInput]:
    """``step_input()`` in two, with the counts of the whole."""
    whole, tokens = step_input(), sum(LENGTHS[:cut])
    ids = (whole.token_ids[:tokens], whole.token_ids[tokens:])
    batches = [TokenBatch.from_lengths(lengths) for lengths in (LENGTHS[:cut], LENGTHS[cut:])]
    return [
        StepInput(own, batch, whole.num_tokens, whole.num_labels)
        for own, batch in zip(ids, batches, strict=True)
    ]


def test_micro_batches_of_stage_2_add_up_to_the_batch(make_pair: Pair) -> None:
    teacher, student = make_pair()
    set_trainable(student, stage=STAGES[2], mode="all")
    options = StepOptions(ALONE, ce_weight=0.5)
    results = [distill_step(teacher, student, part, options) for part in micro_batches(2)]
    summed = gradients(student)
    student.zero_grad()
    result = distill_step(teacher, student, step_input(), options)
    for name in ("loss", "kl", "agreement"):
        torch.testing.assert_close(sum(getattr(part, name) for part in results), getattr(result, name))
    for name, gradient in gradients(student).items():
        assert (gradient - summed[name]).norm() < 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("number", [1, 2], ids=["stage 1", "hidden states"])
def test_relative_errors_of_micro_batches_are_averaged_by_tokens(make_pair: Pair, number: int) -> None:
    teacher, student = make_pair()
    set_trainable(student, stage=STAGES[number], mode="all")
    options = StepOptions(ALONE, kl_weight=0.0, ce_weight=0.0, hidden_weight=3.0)
    parts = micro_batches(3)
    loss = sum(STAGES[number].step(teacher, student, part, options).loss for part in parts)
    summed = gradients(student)
    shares, losses, alone = [], [], []
    for part in parts:
        student.zero_grad()
        own = replace(part, num_tokens=len(part.token_ids), num_labels=len(part.token_ids))
        losses.append(STAGES[number].step(teacher, student, own, options).loss)
        alone.append(gradients(student))
        shares.append(len(part.token_ids) / sum(LENGTHS))
    torch.testing.assert_close(loss, sum(share * own for share, own in zip(shares, losses, strict=True)))
    for name, gradient in summed.items():
        expected = sum(share * own[name] for share, own in zip(shares, alone, strict=True))
        assert (gradient - expected).norm() < 1e-5 * expected.norm() + 1e-8, name


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_the_host_never_waits_inside_a_step(make_pair: Pair, number: int) -> None:
    cuda = torch.device("cuda")
    teacher, student = (model.to(cuda) for model in make_pair(tied=False))
    set_trainable(student, stage=STAGES[number], mode="all")
    optimiser = build_optimiser(student, StageSettings())
    cpu = step_input()
    batch = TokenBatch.from_lengths(LENGTHS, device=cuda)
    inputs = replace(cpu, token_ids=cpu.token_ids.to(cuda), batch=batch)
    options = StepOptions(Ranks(0, 1, cuda), ce_weight=0.5, hidden_weight=1.0, dtype=torch.bfloat16)
    for mode in ("default", "error"):  # the first step compiles and measures launch parameters
        torch.cuda.set_sync_debug_mode(mode)
        try:
            STAGES[number].step(teacher, student, inputs, options)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_first_value_gradient_flows_in_stage_2_and_not_in_stage_1(make_pair: Pair) -> None:
    """Layer 0's output is nulled, so only the residuals of later layers lead back to its value."""
    teacher, student = make_pair()
    mixer = student.model.layers[0].self_attn
    with torch.no_grad():
        mixer.output.weight.zero_()
    set_trainable(student, stage=STAGES[2], mode="all")
    distill_step(teacher, student, step_input(), StepOptions(ALONE))
    assert mixer.value.weight.grad.norm() > 0
    student.zero_grad()
    set_trainable(student, stage=STAGES[1], mode="all")
    align_step(teacher, student, step_input(), StepOptions(ALONE))
    assert mixer.value.weight.grad.norm() == 0


@pytest.mark.parametrize(
    ("stage", "mode", "name", "expected"),
    [
        (1, "all", "model.layers.3.self_attn.w0", True),
        (1, "all", "model.layers.2.self_attn.q_proj.weight", True),
        (1, "all", "model.layers.3.mlp.up_proj.weight", False),
        (1, "all", "model.layers.3.input_layernorm.weight", False),
        (1, "all", "model.layers.0.self_attn.v1", False),
        (2, "all", "model.layers.0.self_attn.k0", False),
        (2, "all", "model.layers.10.self_attn.k0", True),
        (2, "all", "lm_head.weight", True),
        (2, "frozen-mlp", "lm_head.weight", False),
        (2, "frozen-mlp", "model.embed_tokens.weight", False),
        (2, "frozen-mlp", "model.norm.weight", False),
        (3, "frozen-mlp", "model.layers.3.mlp.up_proj.bias", False),
        (3, "frozen-mlp", "model.layers.3.post_attention_layernorm.weight", True),
        (3, "frozen-mlp", "model.layers.3.self_attn.r_k", True),
    ],
)
def test_what_trains(stage: int, mode: str, name: str, expected: bool) -> None:
    assert trains(name, stage=STAGES[stage], mode=mode, unread=UNREAD) is expected


def test_rows_of_all_processes_are_the_batch() -> None:
    ids, lengths = torch.arange(32), (3, 5, 8, 1, 7, 8)
    cpu = torch.device("cpu")
    parts = [
        split_rows(ids, TokenBatch.from_lengths(lengths), context_length=8, ranks=Ranks(rank, 2, cpu))
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([part.token_ids for part in parts]), ids)
    assert [part.batch.lengths for part in parts] == [(3, 5, 8), (1, 7, 8)]
    assert all((part.num_tokens, part.num_labels) == (32, 26) for part in parts)
    with pytest.raises(ValueError, match="a batch has 4 rows of 8 tokens for 3 processes"):
        split_rows(ids, TokenBatch.from_lengths(lengths), context_length=8, ranks=Ranks(0, 3, cpu))


def test_a_pair_that_does_not_fit_is_refused(make_pair: Pair) -> None:
    teacher, student = make_pair()
    check_pair(student.config, teacher.config)
    with pytest.raises(ValueError, match="student has no RWKV layer"):
        check_pair(teacher.config, teacher.config)
    student.config.vocab_size = 300
    with pytest.raises(ValueError, match="vocab_size of the student is 300, of the teacher 260"):
        check_pair(student.config, teacher.config)
    assert {FULL, LINEAR} == set(student.config.layer_types)
