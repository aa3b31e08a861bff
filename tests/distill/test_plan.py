"""Plans of tiny and of published shapes: what is refused, and that the advice keeps its word."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hrwkv.distill.calibrate import STEPS, WARM_UP, Corrections, measure_rate, rate_key, shortened
from hrwkv.distill.gpus import GPUS, Gpu
from hrwkv.distill.plan import RESERVE, check, differences, make_plan, smallest_change
from hrwkv.distill.plan_memory import Pair, plan_memory
from hrwkv.model.checkpoint import load_config
from hrwkv.settings import DataSettings, DistillSettings, StageSettings
from tests.builders import hybrid_config

# Large enough that memory is in activations and moments, small enough to build in no time.
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 4096}
PAIR = Pair.of(hybrid_config((2,), **WIDE), hybrid_config(range(4), **WIDE))
ROWS = DataSettings(context_length=1024, batch_tokens=16 * 1024)
SETTINGS = DistillSettings(dtype="bfloat16", data=ROWS)


def gpu_of(size: float) -> Gpu:
    """A GPU that has so many bytes beyond the reserve."""
    return replace(GPUS["h100"], memory=size + RESERVE)


def needs(settings: DistillSettings, gpus: int = 1) -> int:
    return max(plan_memory(PAIR, settings, stage=stage, gpus=gpus).total for stage in (1, 2, 3))


def test_plan_fits_to_the_byte() -> None:
    size = needs(SETTINGS)
    assert make_plan(PAIR, SETTINGS, gpu_of(size)).fits
    assert not make_plan(PAIR, SETTINGS, gpu_of(size - 1)).fits


def test_hours_are_whole_steps_over_the_corrected_rate() -> None:
    settings = replace(SETTINGS, stage2=StageSettings(tokens=100_000))
    plain = make_plan(PAIR, settings, GPUS["h200"]).stages[1]
    assert (plain.steps, plain.tokens) == (7, 7 * 16 * 1024)
    assert plain.hours == pytest.approx(plain.tokens / plain.tokens_per_second / 3600)
    half = make_plan(PAIR, settings, GPUS["h200"], corrections={2: 0.5})
    assert half.stages[1].hours == pytest.approx(2 * plain.hours)
    assert half.stages[1].mfu == pytest.approx(plain.mfu / 2)
    assert half.hours == pytest.approx(sum(stage.hours for stage in half.stages))


@pytest.mark.parametrize(
    ("less", "words"),
    [
        (0, ()),
        (1, ("stage2.micro_batch_tokens = 8192", "stage3.micro_batch_tokens = 8192")),
    ],
    ids=["fits-already", "one-byte"],
)
def test_the_change_is_no_larger_than_it_must_be(less: int, words: tuple[str, ...]) -> None:
    found = smallest_change(PAIR, SETTINGS, gpu_of(needs(SETTINGS) - less), gpus=1)
    assert found is not None
    assert found.words == words
    assert found.gpus == 1


@pytest.mark.parametrize("mode", ["all", "frozen-mlp"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3, 0.2, 0.12])
def test_what_is_advised_fits(share: float, mode: str) -> None:
    settings = replace(SETTINGS, mode=mode)
    gpu = gpu_of(share * needs(settings))
    found = smallest_change(PAIR, settings, gpu, gpus=1)
    assert found is not None
    assert make_plan(PAIR, found.settings, gpu, gpus=found.gpus).fits
    asked = {word.split(" = ")[0] for word in found.words if not word.startswith("--")}
    assert asked == {word.split(" = ")[0] for word in differences(settings, found.settings)}
    assert (f"--gpus {found.gpus}" in found.words) == (found.gpus != 1)


def test_a_batch_of_too_few_rows_for_more_gpus_is_made_larger() -> None:
    """Two rows kept a 72B model from every plan for more than two GPUs: no change helped."""
    few = replace(SETTINGS, data=DataSettings(context_length=1024, batch_tokens=2 * 1024))
    share = {f"stage{number}": StageSettings(batch_tokens=8 * 1024) for number in (1, 2, 3)}
    gpu = gpu_of(needs(replace(few, **share), gpus=8))
    found = smallest_change(PAIR, few, gpu, gpus=8)
    assert found is not None
    assert found.words == tuple(f"stage{number}.batch_tokens = 8192" for number in (1, 2, 3))
    assert make_plan(PAIR, found.settings, gpu, gpus=8).fits
    narrow = replace(few, dtype="bfloat16", parallel="fsdp2", reduce_each_micro_batch=True)
    small = gpu_of(0.2 * needs(narrow))
    found = smallest_change(PAIR, narrow, small, gpus=1)
    assert found is not None
    assert found.gpus > 2
    assert found.settings.mode == "all"
    assert make_plan(PAIR, found.settings, small, gpus=found.gpus).fits


def test_no_change_helps_a_gpu_without_memory() -> None:
    assert smallest_change(PAIR, SETTINGS, gpu_of(0), gpus=1) is None


def test_eight_bits_are_given_up_before_a_plan_takes_several_gpus() -> None:
    """The trainer refuses 8-bit weights on several processes."""
    settings = replace(SETTINGS, mode="frozen-mlp", frozen_dtype="float8")
    own = StageSettings(gradient_checkpointing=True, optimiser="adamw8bit", micro_batch_tokens=1024)
    settings = replace(settings, stage1=own, stage2=own, stage3=own)
    deep = {**WIDE, "num_hidden_layers": 24}
    pair = Pair.of(hybrid_config((2,), **deep), hybrid_config(range(24), **deep))
    memory = max(plan_memory(pair, settings, stage=stage).total for stage in (1, 2, 3))
    found = smallest_change(pair, settings, gpu_of(0.7 * memory), gpus=1)
    assert found is not None
    assert found.gpus > 1
    assert found.settings.frozen_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        (replace(SETTINGS, mode="frozen-mlp", frozen_dtype="int8"), 2, "frozen_dtype is 'int8' with 2 GPUs"),
        (
            SETTINGS,
            3,
            "stage1 has 16 rows of 1024 tokens in a batch for 3 GPUs: make batch_tokens a multiple",
        ),
        (
            replace(SETTINGS, stage2=StageSettings(micro_batch_tokens=3072)),
            1,
            "stage2.micro_batch_tokens is 3072",
        ),
    ],
    ids=["eight-bits", "rows", "micro-batch"],
)
def test_what_the_trainer_refuses_is_refused_before(settings, gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(settings, gpus)


def test_disk_holds_every_model_and_the_largest_checkpoints() -> None:
    plan = make_plan(PAIR, SETTINGS, GPUS["h200"])
    model = 4 * (plan.stages[1].memory.trained + plan.stages[1].memory.frozen)
    assert plan.disk == 5 * model + 3 * (model + 8 * plan.stages[1].memory.trained)


def test_rates_are_measured_by_real_steps(directories: tuple[Path, Path, Path]) -> None:
    student, teacher, text = directories
    data = DataSettings(sources=(str(text),), context_length=16, batch_tokens=32)
    settings = DistillSettings(data=data, device="cpu", validation_tokens=32)
    short = shortened(settings, 2)
    assert short.steps(2) == STEPS + 1
    assert short.stage1 == settings.stage1
    before = sorted(path.name for path in student.parent.iterdir())
    assert measure_rate(student, teacher, settings, stage=2) > 0
    assert sorted(path.name for path in student.parent.iterdir()) == before
    assert 0 < WARM_UP < STEPS


def test_corrections_are_kept_for_the_same_work_alone(
    directories: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    pair = Pair.of(load_config(directories[0]), load_config(directories[1]))
    settings, gpu, path = SETTINGS, GPUS["h200"], tmp_path / "cache" / "plan.json"
    planned = make_plan(pair, settings, gpu).stages[1].tokens_per_second
    ratio = Corrections(path).add(pair, settings, gpu, stage=2, rate=planned / 4)
    assert ratio == pytest.approx(0.25)
    known = Corrections(path)
    assert known.of(pair, settings, gpu) == pytest.approx({2: 0.25})
    longer = replace(settings, stage2=replace(settings.stage2, tokens=5, learning_rate=1.0))
    assert known.of(pair, longer, gpu) == pytest.approx({2: 0.25})
    for changes in (
        {"mode": "frozen-mlp"},
        {"stage2": replace(settings.stage2, gradient_checkpointing=True)},
    ):
        assert known.of(pair, replace(settings, **changes), gpu) == {}
    assert known.of(pair, settings, GPUS["h100"]) == {}
    assert known.of(PAIR, settings, gpu) == {}
    assert list(json.loads(path.read_text())) == [rate_key(pair.student, settings, gpu, stage=2)]
