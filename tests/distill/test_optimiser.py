"""Parameter groups and the learning rate at the ends of its schedule."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch

from hrwkv.distill.optimiser import (
    build_optimiser,
    optimiser_state,
    schedule_factor,
    set_learning_rate,
    trained_parameters,
)
from hrwkv.distill.stages import STAGES, set_trainable
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import StageSettings


@pytest.mark.parametrize(("steps", "warmup_ratio"), [(100, 0.1), (7, 0.3), (2, 0.0), (50, 0.0)])
def test_schedule_rises_to_the_peak_and_ends_at_the_final_rate(steps: int, warmup_ratio: float) -> None:
    options = {"steps": steps, "warmup_ratio": warmup_ratio, "final_ratio": 0.02}
    factors = [schedule_factor(step, **options) for step in range(steps)]
    warmup = round(steps * warmup_ratio)
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[warmup] == 1.0
    assert factors[-1] == pytest.approx(0.02, abs=1e-12)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_schedule_is_half_way_down_in_the_middle() -> None:
    assert schedule_factor(50, steps=101, warmup_ratio=0.0, final_ratio=0.2) == pytest.approx(0.6)


def test_schedule_of_a_single_step_is_the_peak() -> None:
    assert schedule_factor(0, steps=1, warmup_ratio=0.5, final_ratio=0.1) == 1.0


def test_groups_have_their_own_rates_and_decay_matrices_only(
    make_pair: Callable[..., tuple[HybridModel, HybridModel]],
) -> None:
    _, student = make_pair()
    set_trainable(student, stage=STAGES[2], mode="all")
    settings = StageSettings(learning_rate=1e-2, base_learning_rate=1e-3, weight_decay=0.1)
    optimiser = build_optimiser(student, settings)
    set_learning_rate(optimiser, 0.5)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert found["model.layers.1.self_attn.w0"] == (5e-3, 0.0)
    assert found["model.layers.1.self_attn.r_k"] == (5e-3, 0.0)
    assert found["model.layers.1.self_attn.w2"] == (5e-3, 0.1)
    assert found["model.layers.2.self_attn.q_proj.weight"] == (5e-3, 0.1)
    assert found["model.layers.1.mlp.up_proj.weight"] == (5e-4, 0.1)
    assert found["model.norm.weight"] == (5e-4, 0.0)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained


def trained_student(make_pair: Callable[..., tuple[HybridModel, HybridModel]]) -> HybridModel:
    """A student whose trained parameters have gradients."""
    _, student = make_pair()
    set_trainable(student, stage=STAGES[2], mode="all")
    give_gradients(student, seed=0)
    return student


def give_gradients(student: HybridModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in trained_parameters(student):
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_state_that_was_read_goes_on_as_the_one_that_was_written(
    make_pair: Callable[..., tuple[HybridModel, HybridModel]], kind: str
) -> None:
    """A fresh state moves no weight, and filled in place it takes the same next step, bit for bit."""
    if kind == "adamw8bit":
        pytest.importorskip("torchao.optim")
    settings = StageSettings(optimiser=kind, weight_decay=0.1)
    student = trained_student(make_pair)
    first = build_optimiser(student, settings)
    set_learning_rate(first, 1.0)
    first.step()
    other = copy.deepcopy(student)
    second = build_optimiser(other, settings)
    state = optimiser_state(other, second, fresh=True)
    for (name, ours), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for name, values in optimiser_state(student, first).items():
        assert state[name].keys() == values.keys()
        for part, value in values.items():
            state[name][part].copy_(value)
    for model, optimiser in ((student, first), (other, second)):
        give_gradients(model, seed=1)
        set_learning_rate(optimiser, 0.7)
        optimiser.step()
    for (name, ours), theirs in zip(student.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_moments_in_8_bits_need_torchao(
    make_pair: Callable[..., tuple[HybridModel, HybridModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        ValueError, match="optimiser is 'adamw8bit' but torchao is missing: pip install torchao"
    ):
        build_optimiser(trained_student(make_pair), StageSettings(optimiser="adamw8bit"))
