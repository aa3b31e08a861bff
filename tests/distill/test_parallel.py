"""Two processes on gloo are one: losses, gradient norms, models, and a checkpoint that changes hands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hrwkv.distill.logs import Progress
from hrwkv.distill.trainer import distill
from hrwkv.model.checkpoint import load_model
from hrwkv.settings import DataSettings, DistillSettings, StageSettings

WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_parallel
torch.set_num_threads(1)
test_parallel.run_both(*map(Path, sys.argv[2:]))
"""
LAST = 7  # where the run that changes hands is interrupted; its last checkpoint is that of step 6
Directories = tuple[Path, Path, Path]
Rows = list[dict[str, Any]]


class StoppedError(Exception):
    """What the observer raises in place of a power cut."""


def settings_for(text: Path, mode: Any) -> DistillSettings:
    stage = StageSettings(tokens=8 * 64, learning_rate=4e-3, weight_decay=0.01, clip=0.5, ce_weight=0.2)
    return DistillSettings(
        mode=mode,
        data=DataSettings(sources=(str(text),), context_length=16, batch_tokens=64),
        stage1=stage,
        stage2=replace(stage, gradient_checkpointing=True),
        validate_every=4,
        validation_tokens=128,
        checkpoint_every=3,
        device="cpu",
    )


def ignore(_: Progress) -> None:
    pass


def run_both(student: Path, teacher: Path, text: Path, out: Path) -> None:
    """What each of the two processes does: a whole run, and one of mode frozen-mlp that is interrupted."""
    torch.distributed.init_process_group("gloo")

    def stop(progress: Progress) -> None:
        if progress.stage == 2 and progress.step == LAST:
            raise StoppedError

    settings = settings_for(text, "all")
    distill(student, teacher, out / "all", settings, stages=(1, 2), resume=False, observer=ignore)
    settings = settings_for(text, "frozen-mlp")
    distill(student, teacher, out / "frozen", settings, stages=(1, 2), resume=False, observer=stop)


def rows(out: Path) -> Rows:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(directories: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(worker),
    ]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent), *map(str, directories), str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert "StoppedError" in done.stderr, done.stderr[-3000:]
    return folder


def assert_same(one: Rows, other: Rows) -> None:
    """Sums of fp32 in another order, carried through 16 AdamW steps: five digits stay."""
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in other]
    for mine, theirs in zip(one, other, strict=True):
        names = ["loss", "grad_norm"] + (["layer_loss"] if mine["stage"] == 1 else ["kl", "agreement"])
        for name in [*names, *(["validation"] if "validation" in mine else [])]:
            assert theirs[name] == pytest.approx(mine[name], rel=2e-5), (mine["stage"], mine["step"], name)


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradient_norms_of_one(
    directories: Directories, two: Path, tmp_path: Path
) -> None:
    student, teacher, text = directories
    out = tmp_path / "one"
    distill(student, teacher, out, settings_for(text, "all"), stages=(1, 2), resume=False, observer=ignore)
    assert len(rows(out)) == 16
    assert_same(rows(out), rows(two / "all"))
    mine, other = (load_model(path / "stage2").state_dict() for path in (out, two / "all"))
    for name, tensor in mine.items():
        # AdamW moves a weight by up to its rate where a gradient is as small as its rounding.
        assert (tensor - other[name]).norm() <= 1e-4 * tensor.norm() + 1e-4, name


@pytest.mark.slow
def test_checkpoint_of_two_processes_is_resumed_by_one(
    directories: Directories, two: Path, tmp_path: Path
) -> None:
    """In mode frozen-mlp, where one process shares the frozen weights with the teacher and two do not."""
    student, teacher, text = directories
    settings, out = settings_for(text, "frozen-mlp"), tmp_path / "one"
    distill(student, teacher, out, settings, stages=(1, 2), resume=False, observer=ignore)
    assert (two / "frozen" / "checkpoints" / "stage2-step0000006" / "trainer.json").exists()
    distill(student, teacher, two / "frozen", settings, stages=(1, 2), resume=True, observer=ignore)
    assert_same(rows(out), rows(two / "frozen"))
