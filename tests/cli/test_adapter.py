"""``hrwkv adapter merge``: the command, and its mistakes in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hrwkv.model.checkpoint import load_model
from tests.cli.conftest import Files, Run
from tests.cli.test_errors import check_refusal

KEY = "blocks.1.att.key"
LORA = {f"{KEY}.lora_A": torch.ones(2, 32), f"{KEY}.lora_B": torch.ones(16, 2)}
BONE = {f"{KEY}.bone": torch.ones(4, 8, 8)}


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], Path]:
    """``adapter(tensors)``: a file of them."""

    def save(tensors: dict[str, torch.Tensor]) -> Path:
        torch.save(tensors, tmp_path / "lora.pth")
        return tmp_path / "lora.pth"

    return save


def test_adapter_is_merged(
    files: Files, run: Run, tmp_path: Path, adapter: Callable[[dict[str, torch.Tensor]], Path]
) -> None:
    tensors = {**LORA, "ln_out.weight": torch.full((32,), 3.0)}
    out = tmp_path / "out"
    done = run("adapter", "merge", files.student, adapter(tensors), out, "--scaling", 0.5)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{out}: weights with lora.pth merged: 1, tensors replaced by its own: 1\n"
    before, after = load_model(files.student).state_dict(), load_model(out).state_dict()
    name = "model.layers.1.self_attn.key.weight"
    # 0.5 times ones [16, 2] times ones [2, 32] adds 1 everywhere.
    assert torch.equal(after[name], before[name] + 1)
    assert torch.equal(after["model.norm.weight"], torch.full((32,), 3.0))
    assert (out / "tokenizer.json").read_bytes() == (files.student / "tokenizer.json").read_bytes()


MISTAKES: dict[str, tuple[dict[str, torch.Tensor], list[object], str]] = {
    "no-scaling": (LORA, [], "give --scaling as the adapter was trained, both 0.5"),
    "scaling-no-number": (LORA, ["--scaling", "half"], 'unable to convert "half" into float'),
    "scaling-for-bone": (
        BONE,
        ["--scaling", 2.0],
        "has no LoRA or DoRA parts that it would scale: leave it out",
    ),
    "no-such-layer": (
        {"blocks.7.att.key.bone": torch.ones(4, 8, 8)},
        [],
        "lora.pth: blocks.7.att.key.bone is no tensor of the model",
    ),
    "misshapen": (
        {f"{KEY}.bone": torch.ones(4, 5, 5)},
        [],
        "bone has shape [4, 5, 5], expected [in / r, r, r]",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(
    case: str,
    files: Files,
    run: Run,
    tmp_path: Path,
    adapter: Callable[[dict[str, torch.Tensor]], Path],
) -> None:
    tensors, flags, says = MISTAKES[case]
    outcome = run("adapter", "merge", files.student, adapter(tensors), tmp_path / "out", *flags)
    check_refusal(outcome, says=says, out=tmp_path / "out")


def test_paths_that_are_no_model_and_no_adapter(files: Files, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("adapter", "merge", tmp_path / "none", files.student, out)
    check_refusal(outcome, says="none is not a directory: expected a model directory", out=out)
    outcome = run("adapter", "merge", files.student, tmp_path / "none.pth", out)
    check_refusal(outcome, says="none.pth does not exist", out=out)
    (tmp_path / "text.pth").write_text("no weights")
    outcome = run("adapter", "merge", files.student, tmp_path / "text.pth", out)
    check_refusal(outcome, says="text.pth starts with b'no w'", out=out)
    outcome = run("adapter", "mrege", files.student, tmp_path / "none.pth", out)
    check_refusal(outcome, says='Did you mean "merge"?', out=out)


@pytest.mark.parametrize("words", [["adapter"], ["adapter", "merge"]])
def test_help_has_examples(words: list[str], run: Run) -> None:
    done = run(*words, "--help")
    assert (done.code, done.err) == (0, "")
    assert "hrwkv adapter merge model/ rwkv-lora.pth merged/ --scaling 0.5" in done.out.split("Examples")[1]
