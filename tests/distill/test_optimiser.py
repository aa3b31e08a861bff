"""Parameter groups and the learning rate at the ends of its schedule."""

from collections.abc import Callable

import pytest

from hrwkv.distill.optimiser import build_optimiser, schedule_factor, set_learning_rate
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
