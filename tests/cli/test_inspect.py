"""``hrwkv inspect``: text for a reader, JSON for a program, checksums on request."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hrwkv.cli.recipes import RECIPES
from hrwkv.convert.inspection import inspect_path
from hrwkv.convert.presets import presets_of
from tests.builders import hybrid_model
from tests.cli.conftest import Files, Run
from tests.convert.published import write_directory, write_pth


def test_text_names_what_is_known_and_what_is_missing(run: Run, tmp_path: Path) -> None:
    model = hybrid_model((1, 3), head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 8e6})
    write_directory(model, tmp_path / "model", model_type="qwen3")
    done = run("inspect", tmp_path / "model")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for expected in (
        "form rwkv-infer-safetensors: hybrid as published in safetensors",
        "layers 4: 2 RWKV-7, 2 attention",
        "attention layers 1, 3",
        "ranks decay 5, iclr 4, value 3, key 3, gate 6",
        "linear rope yes",
        "attention rope no",
        "rope theta 8,000,000 (config.json)",
        "rms norm eps 1e-06 (config.json)",
        "state 131,072 bytes per sequence, fp32",
        "KV cache 1,024 bytes per token, bf16; with full attention 2,048 (1 : 2.00)",
        f"weights {4 * parameters:,} bytes, float32, in 2 files",
        "checksums not recorded",
        "Missing: tokenizer: none of tokenizer.json, tokenizer.model, vocab.json beside the weights",
    ):
        assert expected in lines
    assert lines[-1].startswith("Carry nothing: model.layers.")
    assert lines[-1].endswith(" and 1 more")


def test_teacher_and_pth_show_what_they_have(files: Files, run: Run, tmp_path: Path) -> None:
    teacher = run("inspect", files.teacher)
    assert (teacher.code, teacher.err) == (0, "")
    assert "full attention" not in teacher.out
    assert "variant" not in teacher.out
    write_pth(hybrid_model(()), tmp_path / "model.pth")
    pure = " ".join(run("inspect", tmp_path / "model.pth").out.split())
    assert "rope theta not said" in pure
    assert "KV cache 0 bytes per token, bf16; with full attention 256 parameters" in pure
    assert "give --rope-theta and --rms-norm-eps, or --like" in pure


def test_adapter_is_one(run: Run, tmp_path: Path) -> None:
    torch.save({"blocks.0.att.key.bone": torch.zeros(2, 4, 4)}, tmp_path / "adapter.pth")
    out = " ".join(run("inspect", tmp_path / "adapter.pth").out.split())
    assert "form adapter: adapter of RWKV's trainers adapted weights 1 by bone, rank 4 parameters 32" in out


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
def test_json_is_the_inspection(verify: bool, files: Files, run: Run) -> None:
    done = run("inspect", files.student, "--json", *["--verify"][:verify])
    assert (done.code, done.err) == (0, "")
    found = inspect_path(files.student, presets=presets_of(RECIPES))
    found = dataclasses.replace(found, verified_files=1 if verify else None)
    assert json.loads(done.out) == json.loads(json.dumps(dataclasses.asdict(found)))
    assert list(json.loads(done.out)) == [field.name for field in dataclasses.fields(found)]


def test_verify_says_that_files_match(files: Files, run: Run) -> None:
    done = run("inspect", files.student, "--verify")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "1 file matches"


def flip_a_byte(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_the_checksums(model: Path) -> None:
    (model / "SHA256SUMS").unlink()


def promise_another_file(model: Path) -> None:
    with (model / "SHA256SUMS").open("a") as opened:
        opened.write(f"{'0' * 64}  other.safetensors\n")


def cut_off(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped-byte": (flip_a_byte, "model.safetensors has sha256"),
    "no-checksums": (lose_the_checksums, "has no SHA256SUMS: it was not written with checksums"),
    "missing-file": (promise_another_file, "names other.safetensors, which is missing"),
    "cut-off": (cut_off, "model.safetensors is not a complete safetensors file"),
}


@pytest.mark.parametrize("flags", [["--verify"], ["--verify", "--json"]], ids=["text", "json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage: str, flags: list[str], files: Files, run: Run, tmp_path: Path) -> None:
    change, says = DAMAGE[damage]
    model = shutil.copytree(files.student, tmp_path / "model")
    change(model)
    done = run("inspect", model, *flags)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("hrwkv: ")
    assert says in done.err
    assert done.out == "" or "--json" not in flags


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_what_is_no_model_is_one_line(flags: list[str], run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "folder").mkdir()
    for name, says in (
        ("none", "none does not exist: give a file of weights or a model directory"),
        ("folder", "folder is not a model: expected *.safetensors"),
        ("text.pth", "text.pth starts with b'no w'"),
    ):
        done = run("inspect", tmp_path / name, *flags)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert says in done.err
