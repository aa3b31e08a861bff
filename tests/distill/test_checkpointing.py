"""What a checkpoint holds, and that whatever stops the writing of one leaves the one before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrwkv.distill.checkpointing import Checkpoint, Checkpoints, claimed, write_model
from hrwkv.distill.optimiser import build_optimiser, optimiser_state
from hrwkv.distill.parallel import Engine, Ranks, open_model, start
from hrwkv.distill.stages import STAGES, trains
from hrwkv.model.checkpoint import load_model, open_weights, save_model
from hrwkv.model.shards import CheckpointError
from hrwkv.settings import StageSettings

ALONE = Ranks(0, 1, torch.device("cpu"))
Directories = tuple[Path, Path, Path]


class KilledError(BaseException):
    """What no handler in the package catches, in place of a kill."""


def make_engine(path: Path) -> Engine:
    """An engine of stage 1 that has made one step on random gradients."""
    student = open_model(
        path,
        ALONE,
        dtype=torch.float32,
        trains=lambda name: trains(name, stage=STAGES[1], mode="all", unread=frozenset()),
    )
    engine = start(
        student,
        build_optimiser(student, StageSettings()),
        ALONE,
        kind="fsdp2",
        dtype=torch.float32,
        path=path,
        read_state=optimiser_state,
    )
    take_a_step(engine)
    return engine


def take_a_step(engine: Engine) -> None:
    with engine.micro_batch(last=True):
        for parameter in engine.student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    engine.step(0.0)


def latest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.latest(1)
    assert found is not None
    return found


def test_a_checkpoint_is_a_model_directory_with_moments(directories: Directories, tmp_path: Path) -> None:
    student, _, _ = directories
    engine, checkpoints = make_engine(student), Checkpoints(tmp_path / "kept", ALONE, recipe={"a": 1})
    checkpoints.save(1, 3, engine, source=student, extra={"position": [4, 5]})
    found = latest(checkpoints)
    assert (found.step, found.extra) == (3, {"position": [4, 5]})
    assert (found.model / "tokenizer.json").exists()
    before, after = load_model(student).state_dict(), load_model(found.model).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in engine.student.named_parameters() if parameter.requires_grad}
    assert changed == trained
    again = make_engine(found.model)
    again.load_moments(found.moments)
    for name, moments in optimiser_state(engine.student, engine.optimiser).items():
        for key, value in moments.items():
            assert torch.equal(optimiser_state(again.student, again.optimiser)[name][key], value), (name, key)


def test_what_does_not_train_keeps_its_bytes(directories: Directories, tmp_path: Path) -> None:
    """In the source's dtype: a frozen tensor in bfloat16 is not written in twice its size."""
    student, _, _ = directories
    half = load_model(student)
    save_model(half, tmp_path / "half", companions=student, dtype=torch.bfloat16)
    engine = make_engine(tmp_path / "half")
    write_model(engine, tmp_path / "out", source=tmp_path / "half")
    _, reader, names = open_weights(tmp_path / "out")
    dtypes = {reader.dtype(name) for name in names if ".self_attn." in name}
    assert dtypes == {"float32"}
    assert {reader.dtype(name) for name in names if ".self_attn." not in name} == {"bfloat16"}


@pytest.mark.parametrize("where", ["hrwkv.model.shards.save_file", "hrwkv.distill.checkpointing.os.replace"])
def test_a_kill_while_writing_leaves_the_checkpoint_before(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    student, _, _ = directories
    engine, checkpoints = make_engine(student), Checkpoints(tmp_path / "kept", ALONE, recipe={})
    checkpoints.save(1, 3, engine, source=student)
    weights = load_model(latest(checkpoints).model).state_dict()

    def killed(*_: object, **__: object) -> None:
        raise KilledError("in the middle")

    take_a_step(engine)
    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(KilledError, match="in the middle"):
            checkpoints.save(1, 6, engine, source=student)
    found = latest(checkpoints)
    assert found.step == 3
    for name, tensor in load_model(found.model).state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    checkpoints.save(1, 6, engine, source=student)  # in spite of what the killed one has left
    assert latest(checkpoints).step == 6
    assert sorted(os.listdir(tmp_path / "kept")) == ["stage1-step0000003", "stage1-step0000006"]


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _, _ = directories
    engine, checkpoints = make_engine(student), Checkpoints(tmp_path / "kept", ALONE, recipe={})
    checkpoints.save(1, 3, engine, source=student)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hrwkv.model.shards.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(1, 6, engine, source=student)
    assert os.listdir(tmp_path / "kept") == ["stage1-step0000003"]


def test_a_damaged_model_in_a_checkpoint_is_one_line(directories: Directories, tmp_path: Path) -> None:
    student, _, _ = directories
    checkpoints = Checkpoints(tmp_path / "kept", ALONE, recipe={})
    checkpoints.save(1, 3, make_engine(student), source=student)
    os.truncate(latest(checkpoints).model / "model.safetensors", 1000)
    with pytest.raises(
        CheckpointError, match="cannot read the checkpoint .*0003, remove it to use"
    ) as caught:
        checkpoints.latest(1)
    assert "\n" not in str(caught.value)


CLAIM = """
import sys
from pathlib import Path
import torch
from hrwkv.distill.checkpointing import claimed
from hrwkv.distill.parallel import Ranks
try:
    with claimed(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu"))):
        print("claimed")
except ValueError as error:
    print(error)
"""


def test_a_folder_is_one_runs_at_a_time(tmp_path: Path) -> None:
    """Two runs in one folder wrote into one log, which lost rows."""
    out = tmp_path / "new" / "run"

    def claim_elsewhere() -> str:
        command = [sys.executable, "-c", CLAIM, str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()

    with claimed(out, ALONE):
        with claimed(out, ALONE):  # as a run of all steps and the stage in it
            pass
        refused = f"another run works in {out}: wait for its end, or choose another output"
        assert claim_elsewhere() == refused
    assert claim_elsewhere() == "claimed"
    assert os.listdir(out.parent) == []
