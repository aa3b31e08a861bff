"""Whole runs on tiny models: an interruption changes nothing, and what must not happen ends in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hrwkv.distill import loop
from hrwkv.distill.checkpointing import model_fingerprint
from hrwkv.distill.logs import Progress
from hrwkv.distill.loop import RunStoppedError
from hrwkv.distill.trainer import distill
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.settings import DataSettings, DistillSettings, StageSettings

CONTEXT, ROWS, STEPS = 16, 2, 8
Directories = tuple[Path, Path, Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(text: Path, **changes: Any) -> DistillSettings:
    stage = StageSettings(tokens=STEPS * CONTEXT * ROWS - 5, learning_rate=4e-3, base_learning_rate=1e-3)
    settings = DistillSettings(
        data=DataSettings(sources=(str(text),), context_length=CONTEXT, batch_tokens=CONTEXT * ROWS),
        stage1=stage,
        stage2=replace(stage, ce_weight=0.1, weight_decay=0.01),
        stage3=replace(stage, context_length=2 * CONTEXT),
        validate_every=4,
        validation_tokens=2 * CONTEXT * ROWS,
        checkpoint_every=3,
        device="cpu",
    )
    return replace(settings, **changes)


def rows(out: Path) -> list[dict[str, Any]]:
    """log.jsonl without what depends on the clock."""
    lines = (out / "log.jsonl").read_text().splitlines()
    clock = {"tokens_per_second", "seconds_left"}
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def ignore(_: Progress) -> None:
    pass


class StoppedError(Exception):
    """What the observer raises in place of a power cut."""


def stop_at(stage: int, step: int) -> Callable[[Progress], None]:
    def observer(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise StoppedError(str(step))

    return observer


def test_all_stages_write_models_and_logs(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    seen: list[Progress] = []
    paths = distill(
        student, teacher, tmp_path / "out", recipe(text), stages=(1, 2, 3), resume=False, observer=seen.append
    )
    assert [(p.stage, p.step, p.steps) for p in seen] == [
        (n, i + 1, STEPS) for n in (1, 2, 3) for i in range(STEPS)
    ]
    assert [p.step for p in seen if p.validation] == [4, 8] * 3
    assert seen[-1].tokens == STEPS * CONTEXT * ROWS
    assert seen[-1].learning_rate == pytest.approx(4e-3 * 0.02)
    assert len(seen[0].layer_loss) == 4
    assert seen[0].kl is None
    assert seen[-1].loss == pytest.approx(seen[-1].kl)
    teacher_perplexities = {p.validation.teacher_perplexity for p in seen if p.validation and p.stage < 3}
    assert len(teacher_perplexities) == 1
    assert len(rows(tmp_path / "out")) == 3 * STEPS
    first, last = load_model(paths[1]), load_model(paths[3])
    names = {
        name
        for name, tensor in last.state_dict().items()
        if not torch.equal(tensor, first.state_dict()[name])
    }
    assert "model.embed_tokens.weight" in names
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert len(list((tmp_path / "out" / "tensorboard").rglob("events.*"))) == 3
    assert (paths[3] / "tokenizer.json").exists()


def test_stage_1_trains_mixers_only(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    paths = distill(
        student, teacher, tmp_path / "out", recipe(text), stages=(1,), resume=False, observer=ignore
    )
    before, after = load_model(student).state_dict(), load_model(paths[1]).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    mixers = {name for name in before if ".self_attn." in name}
    unread = {f"model.layers.0.self_attn.{a}{i}" for a in "vk" for i in range(3)}
    assert changed == mixers - unread


@pytest.fixture(scope="module")
def whole(directories: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 without an interruption."""
    student, teacher, text = directories
    out = tmp_path_factory.mktemp("whole") / "out"
    distill(student, teacher, out, recipe(text), stages=(1, 2), resume=False, observer=ignore)
    return out


# Step 2 is before the first checkpoint, 5 between two; the first stage has its own state.
@pytest.mark.parametrize(("stage", "step"), [(1, 5), (2, 2), (2, 7)], ids=["S1-5", "S2-2", "S2-7"])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    directories: Directories, whole: Path, tmp_path: Path, stage: int, step: int
) -> None:
    student, teacher, text = directories
    cut, settings = tmp_path / "cut", recipe(text)
    with pytest.raises(StoppedError, match=r"\d"):
        distill(student, teacher, cut, settings, stages=(1, 2), resume=False, observer=stop_at(stage, step))
    distill(student, teacher, cut, settings, stages=(1, 2), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)
    expected, got = load_model(whole / "stage2").state_dict(), load_model(cut / "stage2").state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_that_step(
    directories: Directories, whole: Path, tmp_path: Path, stage: int
) -> None:
    student, teacher, text = directories
    cut, seen = tmp_path / "cut", []
    with pytest.raises(RunStoppedError, match=f"after step 5/8 of stage {stage}"):
        distill(
            student,
            teacher,
            cut,
            recipe(text, checkpoint_every=0),
            stages=(1, 2),
            resume=False,
            observer=seen.append,
            stop=lambda: (seen[-1].stage, seen[-1].step) == (stage, 5),
        )
    assert os.listdir(cut / "checkpoints") == [f"stage{stage}-step0000005"]
    distill(student, teacher, cut, recipe(text), stages=(1, 2), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)


def test_a_stop_between_stages_is_not_forgotten(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    out, seen = tmp_path / "out", []
    with pytest.raises(RunStoppedError, match="after stage 1"):
        distill(
            student, teacher, out, recipe(text), stages=(1, 2), resume=False, observer=seen.append,
            stop=lambda: seen[-1].step == STEPS,
        )  # fmt: skip
    assert (out / "stage1").exists()
    assert {progress.stage for progress in seen} == {1}


def test_stage_2_starts_from_a_selection(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    out = tmp_path / "out"
    distill(student, teacher, out, recipe(text), stages=(1,), resume=False, observer=ignore)
    shutil.copytree(student, out / "selected")
    distill(student, teacher, out, recipe(text), stages=(2,), resume=False, observer=ignore)
    recipes = json.loads((out / "recipe.json").read_text())
    assert recipes["2"]["student.weights"] == model_fingerprint(student)["weights"]
    assert recipes["2"]["student.weights"] != model_fingerprint(out / "stage1")["weights"]


def test_a_streamed_run_goes_on_where_it_was_in_the_text(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(text.iterdir())]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    settings = recipe(tmp_path / "text.jsonl")
    data = replace(settings.data, tokenise="stream", shuffle_rows=3, dev_bytes=500)
    settings = replace(settings, data=data)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distill(student, teacher, whole, settings, stages=(2,), resume=False, observer=ignore)
    with pytest.raises(StoppedError, match=r"\d"):
        distill(student, teacher, cut, settings, stages=(2,), resume=False, observer=stop_at(2, 7))
    facts = json.loads((cut / "checkpoints" / "stage2-step0000006" / "trainer.json").read_text())
    assert facts["extra"]["stream"]["sources"][0]["block"] == 3  # rows 9 to 11, the last of step 6
    distill(student, teacher, cut, settings, stages=(2,), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)


KILLED_RUN = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_trainer import recipe
from hrwkv.distill.trainer import distill
def observer(progress):
    if (progress.stage, progress.step) == (2, 5):
        os.kill(os.getpid(), signal.SIGKILL)
torch.set_num_threads(1)
student, teacher, text, out = map(Path, sys.argv[2:])
distill(student, teacher, out, recipe(text), stages=(1, 2), resume=False, observer=observer)
"""


def test_killed_process_resumes_to_the_same_losses(
    directories: Directories, whole: Path, tmp_path: Path
) -> None:
    student, teacher, text = directories
    cut = tmp_path / "cut"
    arguments = [str(Path(__file__).parent), *map(str, (student, teacher, text, cut))]
    run = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, *arguments],
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    # A process that is killed while it writes a line or a checkpoint leaves these behind.
    with (cut / "log.jsonl").open("a") as log:
        log.write('{"stage": 2, "st')
    (cut / "checkpoints" / ".stage2-step0000006.partial").mkdir()
    (cut / "checkpoints" / "mine").mkdir()
    distill(student, teacher, cut, recipe(text), stages=(1, 2), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)
    assert os.listdir(cut / "checkpoints") == ["mine"]


def test_two_checkpoints_are_kept(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    settings = recipe(text, checkpoint_every=2)
    with pytest.raises(StoppedError, match=r"\d"):
        distill(
            student, teacher, tmp_path / "out", settings, stages=(1,), resume=False, observer=stop_at(1, 8)
        )
    kept = sorted(os.listdir(tmp_path / "out" / "checkpoints"))
    assert kept == ["stage1-step0000004", "stage1-step0000006"]


def test_stages_one_by_one_are_the_stages_together(
    directories: Directories, whole: Path, tmp_path: Path
) -> None:
    student, teacher, text = directories
    for stage in (1, 2):
        distill(
            student, teacher, tmp_path / "out", recipe(text), stages=(stage,), resume=False, observer=ignore
        )
    assert rows(tmp_path / "out") == rows(whole)


def test_frozen_mlp_leaves_frozen_weights_bit_equal(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    settings = recipe(text, mode="frozen-mlp")
    paths = distill(
        student, teacher, tmp_path / "out", settings, stages=(1, 2), resume=False, observer=ignore
    )
    before, after = load_model(student).state_dict(), load_model(paths[2]).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    unread = {f"model.layers.0.self_attn.{a}{i}" for a in "vk" for i in range(3)}
    frozen = {name for name in before if ".mlp." in name or "embed" in name or "lm_head" in name}
    assert same == unread | frozen | {"model.norm.weight"}


@pytest.mark.parametrize(("stage", "factor"), [(1, 0.4), (2, 0.1)], ids=["S1", "S2"])
def test_one_repeated_batch_is_learnt(
    directories: Directories, tmp_path: Path, stage: int, factor: float
) -> None:
    """A corpus of exactly one batch: the loss of the last step is a small part of the first one's."""
    student, teacher, text = directories
    short = tmp_path / "short.txt"
    # The split is cut by position, 95 % train; with its end-of-text token that is the batch.
    short.write_text("".join(chr(97 + i * i % 26) for i in range(33)))
    tokens = StageSettings(tokens=60 * 32, learning_rate=2e-2, base_learning_rate=5e-3)
    settings = recipe(short, stage1=tokens, stage2=tokens, validate_every=0, checkpoint_every=0)
    settings = replace(settings, data=replace(settings.data, context_length=32, batch_tokens=32))
    losses: list[float] = []
    distill(
        student, teacher, tmp_path / "out", settings, stages=(stage,), resume=False,
        observer=lambda progress: losses.append(progress.loss),
    )  # fmt: skip
    assert losses[-1] < factor * losses[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(
    directories: Directories, tmp_path: Path, stage: int
) -> None:
    student, teacher, text = directories
    model = load_model(student)
    with torch.no_grad():
        model.model.layers[1].self_attn.w0[3] = torch.nan
    save_model(model, tmp_path / "bad", companions=student)
    message = {
        1: "stage 1, step 1: the loss of layer 1 is not finite",
        2: "stage 2, step 1: the loss is not finite, first in the output of layer 1 of the student",
    }
    with pytest.raises(ValueError, match=message[stage]):
        distill(
            tmp_path / "bad",
            teacher,
            tmp_path / "out",
            recipe(text),
            stages=(stage,),
            resume=False,
            observer=ignore,
        )
    assert not (tmp_path / "out" / "log.jsonl").read_text()


def test_a_gradient_that_is_not_finite_stops_the_run(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, text = directories
    set_rate = loop.set_learning_rate

    def spoil(optimiser: torch.optim.Optimizer, factor: float) -> None:
        set_rate(optimiser, factor)
        parameter = optimiser.param_groups[0]["params"][0]
        parameter.register_hook(lambda gradient: gradient * torch.inf)

    monkeypatch.setattr(loop, "set_learning_rate", spoil)
    name = "model.embed_tokens.weight"
    with pytest.raises(ValueError, match=rf"stage 2, step 1: the gradient \({name}\) is not finite"):
        distill(student, teacher, tmp_path / "out", recipe(text), stages=(2,), resume=False, observer=ignore)


def begun(directories: Directories, out: Path) -> None:
    student, teacher, text = directories
    with pytest.raises(StoppedError, match=r"\d"):
        distill(student, teacher, out, recipe(text), stages=(1,), resume=False, observer=stop_at(1, 4))


def test_resume_with_another_recipe_names_the_key(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    out = tmp_path / "out"
    begun(directories, out)
    before = (out / "recipe.json").read_text()
    other = recipe(text, stage1=replace(recipe(text).stage1, clip=0.5))
    with pytest.raises(ValueError, match=r"stage\.clip is 0\.5, the interrupted run had 1\.0"):
        distill(student, teacher, out, other, stages=(1,), resume=True, observer=ignore)
    assert (out / "recipe.json").read_text() == before
    # How often the run reports is no part of the recipe.
    distill(student, teacher, out, recipe(text, validate_every=3), stages=(1,), resume=True, observer=ignore)


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_resume_with_another_model_names_it(directories: Directories, tmp_path: Path, changed: str) -> None:
    student, teacher, text = directories
    begun(directories, tmp_path / "out")
    model = load_model({"student": student, "teacher": teacher}[changed])
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    save_model(model, tmp_path / "other", companions=student)
    pair = {"student": student, "teacher": teacher} | {changed: tmp_path / "other"}
    with pytest.raises(ValueError, match=rf"cannot resume .*: {changed}\.weights is"):
        distill(
            pair["student"],
            pair["teacher"],
            tmp_path / "out",
            recipe(text),
            stages=(1,),
            resume=True,
            observer=ignore,
        )


def test_damaged_checkpoint_is_one_line(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    out = tmp_path / "out"
    begun(directories, out)
    for shard in (out / "checkpoints" / "stage1-step0000003").rglob("*.distcp"):
        os.truncate(shard, 100)
    with pytest.raises(OSError, match="cannot read the checkpoint .*stage1-step0000003, remove it") as caught:
        distill(student, teacher, out, recipe(text), stages=(1,), resume=True, observer=ignore)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_nothing(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, text = directories
    out = tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    # Not in a fixture: models and logs are written as always, only a checkpoint's tensors meet the full disk.
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*: .*No space left on device"):
        distill(student, teacher, out, recipe(text), stages=(1,), resume=False, observer=ignore)
    assert os.listdir(out / "checkpoints") == []


def test_output_in_use_is_refused(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="nothing to resume"):
        distill(student, teacher, out, recipe(text), stages=(1,), resume=True, observer=ignore)
    assert not out.exists()
    begun(directories, out)
    with pytest.raises(ValueError, match="has already begun stage 1: go on with --resume"):
        distill(student, teacher, out, recipe(text), stages=(1,), resume=False, observer=ignore)
    with pytest.raises(ValueError, match="exists and is no distillation"):
        distill(student, teacher, text, recipe(text), stages=(1,), resume=False, observer=ignore)


def test_bf16_on_a_cpu_is_refused_before_anything_is_written(
    directories: Directories, tmp_path: Path
) -> None:
    student, teacher, text = directories
    with pytest.raises(ValueError, match="bfloat16.* on a CPU"):
        distill(
            student, teacher, tmp_path / "out", recipe(text, dtype="bfloat16"), stages=(1,), resume=False,
            observer=ignore,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
