"""From stage 1 over a selection to stage 2, through the command line."""

import json
from pathlib import Path

import pytest

from hrwkv.model.checkpoint import load_config
from tests.cli.conftest import RANKS, Files, Run
from tests.cli.test_commands import SMALL

FEW = [
    *("--tokens", 256, "--context-length", 64, "--batch-tokens", 128, "--device", "cpu"),
    *("--recall-lengths", "150,170", "--recall-samples", 1, "--min-recall", 0),
]


def test_selection_lies_between_stage_1_and_stage_2(files: Files, run: Run, tmp_path: Path) -> None:
    student, first, chosen = tmp_path / "student", tmp_path / "first", tmp_path / "chosen"
    assert run("convert", files.teacher, student, "--keep-attention", 0, *RANKS).code == 0
    train = ["--teacher", files.teacher, "--data.sources", files.text, *SMALL]
    assert run("distill", student, "--out", first, "--stage", "1", *train).code == 0

    words = ["select", first / "stage1", "--teacher", files.teacher, "--sources", files.text, *FEW]
    done = run(*words, "--keep", 1, "--out", chosen)
    assert (done.code, done.err) == (0, "")
    record = json.loads((chosen / "selection.json").read_text())
    assert load_config(chosen).full_layers == record["layers"]
    assert len(record["layers"]) == 1
    assert f"{record['layers'][0]} attention" in done.out
    assert "attention in layers" in done.out
    again = run(*words, "--keep", 1, "--out", chosen)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already" in again.err

    assert run("distill", chosen, "--out", tmp_path / "second", "--stage", "2", *train).code == 0
    assert load_config(tmp_path / "second" / "stage2").full_layers == record["layers"]


@pytest.mark.parametrize(
    ("flags", "layers"),
    [((), [2]), (("--layers", "1,2"), [1, 2])],
    ids=["recipe", "flag"],
)
def test_recipe_and_flag_name_the_layers(
    flags: tuple[str, ...], layers: list[int], files: Files, run: Run, tmp_path: Path
) -> None:
    """A flag for the layers takes the recipe's number away, which would contradict it."""
    assert run("convert", files.teacher, tmp_path / "student", "--keep-attention", 0, *RANKS).code == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[select]\nkeep = 1\nmethod = 'even'\n")
    words = ["select", tmp_path / "student", "--teacher", files.teacher, "--recipe", recipe]
    done = run(*words, *flags)
    assert (done.code, done.err) == (0, "")
    assert load_config(tmp_path / "student-selected").full_layers == layers


def test_neither_number_nor_layers_is_told(files: Files, run: Run, tmp_path: Path) -> None:
    done = run("select", files.student, "--teacher", files.teacher, "--out", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "neither of keep and layers given" in done.err
