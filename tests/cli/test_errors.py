"""Every mistake of a user: exit code 2, one line on stderr, nothing in the output's place."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import RANKS, Files, Outcome, Run

Case = Callable[[Files, Path], list[object]]


def check_refusal(outcome: Outcome, *, says: str, out: Path) -> None:
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("hrwkv: ")
    assert says in outcome.err
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


def unknown_family(files: Files, folder: Path) -> list[object]:
    teacher = shutil.copytree(files.teacher, folder / "other")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    return ["convert", teacher, folder / "out", "--keep-attention", 1]


def truncated_shard(files: Files, folder: Path) -> list[object]:
    teacher = shutil.copytree(files.teacher, folder / "cut")
    shard = teacher / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return ["convert", teacher, folder / "out", "--keep-attention", 1, *RANKS]


def missing_tensor(files: Files, folder: Path) -> list[object]:
    teacher = shutil.copytree(files.teacher, folder / "deeper")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return ["convert", teacher, folder / "out", "--keep-attention", 1, *RANKS]


def with_recipe(text: str, *flags: str) -> Case:
    def words(files: Files, folder: Path) -> list[object]:
        recipe = folder / "recipe.toml"
        recipe.write_text(text)
        start = ["distill", files.student, "--teacher", files.teacher, "--out", folder / "out"]
        return [*start, "--recipe", recipe, *flags]

    return words


def with_text(content: bytes) -> Case:
    def words(files: Files, folder: Path) -> list[object]:
        text = folder / "input.txt"
        text.write_bytes(content)
        start = ["distill", files.student, "--teacher", files.teacher, "--out", folder / "out", "--stage", 1]
        return [*start, "--data.sources", text, "--data.context-length", 64, "--data.batch-tokens", 128]

    return words


def convert_with(*flags: object) -> Case:
    return lambda files, folder: ["convert", files.teacher, folder / "out", *flags]


CASES: dict[str, tuple[Case, str]] = {
    "missing-directory": (
        lambda files, folder: ["convert", folder / "none", folder / "out", "--keep-attention", 1],
        "none is not a directory: expected a model directory",
    ),
    "unknown-family": (unknown_family, "family is 'gpt2', expected one of: llama, mistral, qwen2, qwen3"),
    "truncated-shard": (truncated_shard, "model.safetensors is not a complete safetensors file"),
    "missing-tensor": (missing_tensor, "lacks model.layers.3."),
    "layer-99": (convert_with("--attention-layers", 99), "layer 99, but the teacher has layers 0 to 2"),
    "layer-0-kept": (
        convert_with("--attention-layers", "0,2"),
        "--attention-layers names layer 0, expected 1 or higher",
    ),
    "layers-not-chosen": (convert_with(), "neither of --attention-layers and --keep-attention given"),
    "layers-chosen-twice": (
        convert_with("--attention-layers", 1, "--keep-attention", 1),
        "both of --attention-layers and --keep-attention given",
    ),
    "layers-no-number": (convert_with("--attention-layers", "one"), 'unable to convert "one" into int'),
    "unknown-recipe-key": (with_recipe("[distill.stage2]\ntoken = 5"), "Did you mean --stage2.tokens?"),
    "unknown-recipe-table": (with_recipe("[destill]\nseed = 5"), "did you mean [distill]?"),
    "recipe-key-at-the-top": (with_recipe("seed = 5"), "'seed' at the top, expected the tables [convert]"),
    "recipe-no-toml": (with_recipe("x = = 1"), "is not TOML"),
    "recipe-bad-value": (with_recipe("[distill.stage1]\ntokens = -5"), "tokens is -5, expected more than 0"),
    "unknown-flag": (with_recipe("", "--stage2.token", "5"), "Did you mean --stage2.tokens?"),
    "unknown-stage": (with_recipe("", "--stage", "4"), 'Invalid value "4" for --stage. Choose from:'),
    "missing-recipe": (
        lambda files, folder: ["distill", files.student, "--teacher", files.teacher, "--recipe", "nosuch"],
        "recipe 'nosuch' is no file",
    ),
    "empty-text": (with_text(b""), "input.txt is empty (0 bytes): give a file with text"),
    "not-utf8": (with_text(b"abc\xff" * 99), "input.txt is not UTF-8: byte 0xff at offset 3"),
    "nothing-to-resume": (with_recipe("", "--resume"), "there is nothing to resume"),
    "other-teacher": (
        lambda files, folder: ["distill", files.student, "--teacher", folder, "--out", folder / "out"],
        "cannot read",
    ),
    "unknown-command": (lambda files, folder: ["destil"], 'Did you mean "distill"?'),
    "no-prompt": (lambda files, folder: ["generate", files.student], "neither of --prompt and --prompt-file"),
    "bad-temperature": (
        lambda files, folder: ["generate", files.student, "--prompt", "a", "--temperature", -1],
        "temperature is -1.0, expected 0 (greedy) or more",
    ),
    "no-tokens": (
        lambda files, folder: ["chat", files.student, "--max-tokens", 0],
        "--max-tokens is 0, expected at least 1",
    ),
    "eval-of-nothing": (lambda files, folder: ["eval", folder / "none"], "none is not a directory"),
    "eval-missing-text": (
        lambda files, folder: ["eval", files.student, "--text", folder / "none.txt", "--out", folder / "out"],
        "none.txt' does not exist",
    ),
    "demo-without-teacher": (
        lambda files, folder: ["demo", "--teacher", folder / "none", "--out", folder / "out"],
        "none has no config.json",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_one_line(case: str, files: Files, run: Run, tmp_path: Path) -> None:
    words, says = CASES[case]
    check_refusal(run(*words(files, tmp_path)), says=says, out=tmp_path / "out")


def test_existing_output_is_kept(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    outcome = run("convert", files.teacher, tmp_path / "out", "--keep-attention", 1, *RANKS)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "exists already" in outcome.err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_unwritable_output_is_one_line(files: Files, run: Run, tmp_path: Path) -> None:
    """The parent is a file, which not even root can write below."""
    (tmp_path / "file").write_text("")
    outcome = run("convert", files.teacher, tmp_path / "file" / "out", "--keep-attention", 1, *RANKS)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "file" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """``full_disk(n)``: from now on no file can grow beyond n bytes, which stands for a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL_DISK: dict[str, tuple[Case, int]] = {
    "convert": (convert_with("--keep-attention", 1, *RANKS), 20_000),
    "distill": (
        lambda files, folder: [
            *("distill", files.student, "--teacher", files.teacher, "--out", folder / "out", "--stage", 1),
            *("--data.sources", files.text, "--data.context-length", 64, "--data.batch-tokens", 128),
            *("--stage1.tokens", 128, "--device", "cpu"),
        ],
        20_000,
    ),
    "eval": (
        lambda files, folder: [
            *("eval", files.student, "--text", files.text, "--split", "all", "--out", folder / "out"),
            *("--context-length", 64, "--batch-tokens", 128, "--tokens", 256, "--passkey-samples", 0),
        ],
        500,
    ),
}


@pytest.mark.parametrize("command", FULL_DISK)
def test_full_disk_is_one_line(
    command: str, files: Files, run: Run, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    words, size = FULL_DISK[command]
    full_disk(size)
    outcome = run(*words(files, tmp_path))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("hrwkv: ")
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not {name for name in left if name.startswith(("model", "report", ".")) or "partial" in name}


def test_debug_shows_where_it_came_from(run: Run, tmp_path: Path) -> None:
    outcome = run("--debug", "eval", tmp_path / "none")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("hrwkv: ")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from hrwkv.cli import evaluate

    def broken(*unused: object, **also: object) -> None:
        raise AssertionError("an invariant does not hold")

    monkeypatch.setattr(evaluate, "open_model", broken)
    with pytest.raises(AssertionError, match="invariant"):
        run("eval", "anywhere")


def test_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from hrwkv.cli import evaluate

    def pressed(*unused: object, **also: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "open_model", pressed)
    outcome = run("eval", "anywhere")
    assert (outcome.code, outcome.err) == (130, "hrwkv: interrupted\n")
