"""From a teacher to a measured student in one command, interrupted and not."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load

from hrwkv.cli.distill import Watcher
from hrwkv.distill.logs import Progress
from hrwkv.distill.parallel import Ranks
from hrwkv.distill.trainer import RECIPE
from hrwkv.model.checkpoint import load_config, load_model
from tests.cli.conftest import Files, Run
from tests.cli.test_commands import EVAL, SMALL

RANKS = [word for name in ("decay", "iclr", "value", "key", "gate") for word in (f"--convert.{name}-rank", 4)]
ASK = [word.replace("--", "--eval.") if isinstance(word, str) else word for word in EVAL[:-1]] + [1]


def command(files: Files, out: Path, *more: object) -> list[object]:
    start = ["distill", files.teacher, "--out", out, "--data.sources", files.text, *SMALL]
    eval_text = ["--eval.text", files.text, *ASK]
    return [*start, "--convert.keep-attention", 0, *RANKS, "--select.layers", "2", *eval_text, *more]


@pytest.fixture(scope="module")
def teacher_with_card(files: Files) -> Files:
    (files.teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    return files


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_model(out / "stage3").state_dict()


def test_only_the_first_process_prints_and_writes_the_card(
    files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun every process said where the stages are and wrote README.md and loss.png."""
    words = ["distill", files.student, "--teacher", files.teacher, "--stage", "1"]
    for rank in (0, 1):
        monkeypatch.setattr(
            "hrwkv.distill.parallel.joined",
            lambda device, rank=rank: contextlib.nullcontext(Ranks(rank, 2, torch.device("cpu"))),
        )
        out = tmp_path / str(rank)
        done = run(*words, "--out", out, "--data.sources", files.text, *SMALL)
        assert (done.code, done.err) == (0, "")
        assert (out / "stage1").is_dir()
        assert ("Stage 1:" in done.out, "Written:" in done.out, (out / "README.md").exists()) == (
            (True, True, True) if rank == 0 else (False, False, False)
        )
        assert rank == 0 or done.out == ""


def test_only_the_first_process_says_that_it_stopped(
    files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them named a command without torchrun, which would have gone on with a single process."""
    words = ["distill", files.student, "--teacher", files.teacher, "--stage", "1"]
    show = Watcher.__call__

    def interrupt(self: Watcher, progress: Progress) -> None:
        show(self, progress)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watcher, "__call__", interrupt)
    for rank in (0, 1):
        monkeypatch.setattr(
            "hrwkv.distill.parallel.joined",
            lambda device, rank=rank: contextlib.nullcontext(Ranks(rank, 2, torch.device("cpu"))),
        )
        line = [*words, "--out", tmp_path / str(rank), "--data.sources", files.text, *SMALL]
        if rank == 0:
            done = run(*line)
            assert done.code == 130
            assert done.err.endswith("of stage 1; go on with: the same torchrun line and --resume\n")
        else:
            with pytest.raises(SystemExit, match="130"):
                run(*line)


def test_a_process_that_looks_later_than_another_writes_begins_as_well(
    files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun the second process could see the record of the first, and refuse the folder as begun."""
    seen, out = [], tmp_path / "out"
    ranks = Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr("hrwkv.distill.parallel.joined", lambda device: contextlib.nullcontext(ranks))
    monkeypatch.setattr("hrwkv.distill.parallel.barrier", lambda ranks: seen.append((out / RECIPE).exists()))
    assert run(*command(files, out)).code == 0
    assert seen[0] is False


def test_all_steps_and_the_same_after_an_interruption(
    teacher_with_card: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, whole, cut = teacher_with_card, tmp_path / "whole", tmp_path / "cut"
    done = run(*command(files, whole))
    assert (done.code, done.err) == (0, "")
    assert "Step 6 of 6, eval" in done.out
    assert load_config(whole / "converted").full_layers == []
    assert load_config(whole / "stage3").full_layers == [2]
    again = run(*command(files, whole, "--resume"))
    assert again.code == 0
    assert again.out.count(": complete") == 6
    changed = run(*command(files, whole, "--resume", "--stage2.learning-rate", 0.5))
    assert changed.code == 2
    assert "--stage2.learning-rate is 0.5, the interrupted run had 0.001" in changed.err

    show = Watcher.__call__

    def interrupt(self: Watcher, progress: Progress) -> None:
        show(self, progress)
        if (progress.stage, progress.step) == (2, 2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Watcher, "__call__", interrupt)
    stopped = run(*command(files, cut))
    assert stopped.code == 130
    assert stopped.err.count("\n") == 1
    assert "stopped after step 2/3 of stage 2; go on with: hrwkv distill " in stopped.err
    assert stopped.err.rstrip().endswith("--resume")
    assert os.listdir(cut / "checkpoints") == ["stage2-step0000002"]
    refused = run(*command(files, cut))
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    other = run(*command(files, cut, "--resume", "--convert.seed", 1))
    assert "convert.seed is 1, the interrupted run had 0" in other.err
    monkeypatch.setattr(Watcher, "__call__", show)
    assert run(*command(files, cut, "--resume")).code == 0
    expected, got = weights(whole), weights(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    facts = metadata_load(whole / "README.md")
    assert (facts["base_model"], facts["license"]) == ("teacher", "apache-2.0")
    assert facts["pipeline_tag"] == "text-generation"
    card = (whole / "README.md").read_text()
    assert card == (whole / "stage3" / "README.md").read_text()
    assert "| 2 | 384 | " in card
    assert "| stage3 | " in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "TEACHER"], "no layers are chosen"),
        (["distill", "STUDENT"], "so it is a student: give --teacher"),
        (["distill"], "no model is given"),
        (["distill", "TEACHER", "--stage", "2"], "--stage is 2 without --teacher"),
        (["distill", "TEACHER", "--select.keep", "3"], "the teacher has 3"),
        (["distill", "--base-model", "nobody/nothing"], "not in the hub's cache: hf download nobody/nothing"),
    ],
)
def test_what_cannot_begin_is_one_line(
    files: Files, run: Run, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"TEACHER": files.teacher, "STUDENT": files.student}
    done = run(*(places.get(word, word) for word in words), "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run(*command(files, tmp_path))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert os.listdir(tmp_path) == ["mine.txt"]
