"""Spikes are left out, and a number that is not finite is found where it first appears."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrwkv.distill import loop
from hrwkv.distill.guard import ENOUGH, WINDOW, SpikeGuard, first_bad_block
from hrwkv.distill.stages import STAGES, StepOptions, StepResult
from hrwkv.distill.trainer import distill
from hrwkv.model.checkpoint import load_model
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import DistillSettings
from tests.distill.conftest import Pair
from tests.distill.test_stages import ALONE, step_input
from tests.distill.test_trainer import CONTEXT, ROWS, Directories, StoppedError, ignore, recipe, rows, stop_at

STEPS, SPIKE = 14, 11
losses = st.lists(st.floats(0.01, 100.0), max_size=2 * WINDOW)


@given(losses, st.floats(1.01, 10.0))
def test_a_spike_is_above_the_median_of_the_last_accepted_losses(values: list[float], factor: float) -> None:
    guard, accepted = SpikeGuard(factor), []
    for value in values:
        window = accepted[-WINDOW:]
        expected = len(window) >= ENOUGH and value > factor * statistics.median(window)
        assert guard.is_spike(value) == expected
        accepted += [] if expected else [value]
    # What a checkpoint keeps tells the same for what follows.
    assert SpikeGuard(factor, list(guard.losses)).is_spike(50.0) == guard.is_spike(50.0)


@given(losses)
def test_without_a_factor_nothing_is_a_spike(values: list[float]) -> None:
    guard = SpikeGuard(0.0)
    assert not any(guard.is_spike(value) for value in values)


@pytest.mark.parametrize(("name", "layer"), [("teacher", 2), ("student", 1)])
def test_the_first_block_is_named(make_pair: Pair, name: str, layer: int) -> None:
    teacher, student = make_pair()
    assert first_bad_block(teacher, student, [step_input()], StepOptions(ALONE)) is None
    model = {"teacher": teacher, "student": student}[name]
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[3, 1] = torch.inf
    parts = [step_input(5), step_input()]
    found = first_bad_block(teacher, student, parts, StepOptions(ALONE))
    assert found == f"layer {layer} of the {name}"


def spiking_recipe(text: Path, action: str) -> DistillSettings:
    settings = recipe(text, spike_factor=4.0, spike_action=action)
    return replace(settings, stage2=replace(settings.stage2, tokens=STEPS * CONTEXT * ROWS))


Disturb = Callable[[int, HybridModel], float]


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disturb], list[int]]:
    """``disturbed(f)``: stage 2's loss is multiplied by f(step, student); returns the steps as they run."""

    def install(factor: Disturb) -> list[int]:
        seen: list[int] = []
        schedule, step_function = loop.schedule_factor, STAGES[2].step

        def record(step: int, *, steps: int, warmup_ratio: float, final_ratio: float) -> float:
            seen.append(step + 1)
            return schedule(step, steps=steps, warmup_ratio=warmup_ratio, final_ratio=final_ratio)

        def step(*arguments: object) -> StepResult:
            scale = factor(seen[-1], arguments[1])
            result = step_function(*arguments)
            return replace(result, loss=result.loss * scale)

        monkeypatch.setattr(loop, "schedule_factor", record)
        monkeypatch.setitem(loop.STAGES, 2, replace(STAGES[2], step=step))
        return seen

    return install


def spike(step: int, _: HybridModel) -> float:
    return 100.0 if step == SPIKE else 1.0


def test_skip_and_rollback_end_in_the_same_model(
    directories: Directories, tmp_path: Path, disturbed: Callable[[Disturb], list[int]]
) -> None:
    student, teacher, text = directories
    seen = disturbed(spike)
    ran = {}
    for action in ("skip", "rollback"):
        settings = spiking_recipe(text, action)
        distill(student, teacher, tmp_path / action, settings, stages=(2,), resume=False, observer=ignore)
        ran[action] = list(seen)
        seen.clear()
    assert ran["skip"] == list(range(1, STEPS + 1))
    # The last checkpoint before the spike is that of step 9.
    assert ran["rollback"] == [*range(1, SPIKE + 1), *range(10, STEPS + 1)]
    first, second = (rows(tmp_path / action) for action in ("skip", "rollback"))
    assert first == second
    assert [row["step"] for row in first if row.get("skipped")] == [SPIKE]
    left, right = (load_model(tmp_path / name / "stage2").state_dict() for name in ("skip", "rollback"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_resumed_run_remembers_its_losses_and_what_it_left_out(
    directories: Directories, tmp_path: Path, disturbed: Callable[[Disturb], list[int]]
) -> None:
    """Cut after the checkpoint of step 12: without its losses, one more would not be enough to judge."""
    student, teacher, text = directories
    disturbed(lambda step, _: 100.0 if step in (SPIKE, STEPS - 1) else 1.0)
    settings, whole, cut = spiking_recipe(text, "skip"), tmp_path / "whole", tmp_path / "cut"
    distill(student, teacher, whole, settings, stages=(2,), resume=False, observer=ignore)
    assert [row["step"] for row in rows(whole) if row.get("skipped")] == [SPIKE, STEPS - 1]
    with pytest.raises(StoppedError, match=r"\d"):
        distill(student, teacher, cut, settings, stages=(2,), resume=False, observer=stop_at(2, 13))
    distill(student, teacher, cut, settings, stages=(2,), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)
    left, right = (load_model(out / "stage2").state_dict() for out in (whole, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_spikes_are_an_error(
    directories: Directories, tmp_path: Path, disturbed: Callable[[Disturb], list[int]], action: str
) -> None:
    student, teacher, text = directories
    disturbed(spike)
    settings = replace(spiking_recipe(text, action), spike_limit=0)
    with pytest.raises(
        ValueError, match=r"stage 2, step 11: the loss .* is spike number 1, spike_limit is 0"
    ):
        distill(student, teacher, tmp_path / "out", settings, stages=(2,), resume=False, observer=ignore)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are read every fourth step, after the weights have changed: as on a GPU."""
    monkeypatch.setitem(loop.STEPS_PER_READ, "cpu", 4)
    monkeypatch.setattr(loop.StageLoop, "_is_careful", lambda self, step: step <= self.attempt.careful_until)


@pytest.mark.usefixtures("late")
def test_late_metrics_go_back_to_find_the_layer(
    directories: Directories, tmp_path: Path, disturbed: Callable[[Disturb], list[int]]
) -> None:
    student, teacher, text = directories

    def break_down(step: int, model: HybridModel) -> float:
        if step == 6:
            with torch.no_grad():
                model.model.layers[1].self_attn.w0[3] = torch.nan
        return 1.0

    seen = disturbed(break_down)
    message = "stage 2, step 6: the loss is not finite, first in the output of layer 1 of the student"
    settings = recipe(text, validate_every=0)
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, tmp_path / "out", settings, stages=(2,), resume=False, observer=ignore)
    # Seen at the checkpoint that is due at 6, so that it is not written; the one of 3 is good.
    assert seen == [1, 2, 3, 4, 5, 6, 4, 5, 6]


@pytest.mark.usefixtures("late")
def test_a_fault_that_does_not_come_again_changes_nothing(
    directories: Directories, tmp_path: Path, disturbed: Callable[[Disturb], list[int]]
) -> None:
    student, teacher, text = directories
    faults = [0.0]

    def once(step: int, model: HybridModel) -> float:
        if step == 5 and faults:
            with torch.no_grad():
                model.model.layers[0].self_attn.w0[0] = torch.inf
            faults.clear()
            return float("nan")
        return 1.0

    disturbed(once)
    distill(student, teacher, tmp_path / "out", recipe(text), stages=(2,), resume=False, observer=ignore)
    assert not faults
    distill(student, teacher, tmp_path / "whole", recipe(text), stages=(2,), resume=False, observer=ignore)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole")
