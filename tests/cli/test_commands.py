"""The way from a teacher to a text, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrwkv.model.checkpoint import load_config, load_model
from tests.cli.conftest import RANKS, Files, Run

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--data.context-length", 64, "--data.batch-tokens", 128, "--validation-tokens", 128, "--device", "cpu"),
    *("--stage1.tokens", 512, "--stage2.tokens", 384, "--stage3.tokens", 256, "--validate-every", 2),
]
EVAL = [
    *("--split", "all", "--tokens", 512, "--context-length", 128, "--batch-tokens", 256, "--device", "cpu"),
    *("--passkey-lengths", "200,240", "--passkey-depths", "0,1", "--passkey-samples", 1),
]


def test_convert_distil_eval_generate(files: Files, run: Run, tmp_path: Path) -> None:
    student, out, report = tmp_path / "student", tmp_path / "run", tmp_path / "report"
    assert run("convert", files.teacher, student, "--keep-attention", 1, *RANKS).code == 0
    assert load_config(student).full_layers == [2]

    start = [
        "distill",
        student,
        "--teacher",
        files.teacher,
        "--out",
        out,
        "--data.sources",
        files.text,
        *SMALL,
    ]
    done = run(*start, "--stage", "1")
    assert (done.code, done.err) == (0, "")
    assert "stage 1 step 4/4, 512 tokens: held-out KL" in done.out
    assert not (out / "stage2").exists()
    assert run(*start, "--stage", "2").code == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
        (2, 2),
        (2, 3),
    ]
    other = run(*start, "--stage", "2", "--resume", "--stage2.learning-rate", "0.5")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "--stage2.learning-rate is 0.5" in other.err

    words = ["eval", out / "stage2", "--teacher", files.teacher, "--text", files.text, "--out", report, *EVAL]
    done = run(*words)
    assert (done.code, done.err) == (0, "")
    models = json.loads((report / "report.json").read_text())["models"]
    assert [model["name"] for model in models] == ["teacher", "stage2"]
    assert models[1]["comparison"]["overall"]["kl"] > 0
    assert models[1]["memory"]["rwkv_layers"] == 2
    assert models[1]["grid"]["lengths"] == [200, 240]
    assert sorted(p.name for p in report.iterdir()) == [
        "passkey.png",
        "position.png",
        "report.json",
        "report.md",
    ]

    words = ["generate", out / "stage2", "--prompt", "the quick", "--max-tokens", 12, "--temperature", 0]
    first, again = run(*words), run(*words)
    assert first.code == 0
    assert first.out.startswith("the quick")
    assert first.out == again.out


def test_mixers_come_from_an_aligned_student(files: Files, run: Run, tmp_path: Path) -> None:
    assert run("convert", files.teacher, tmp_path / "pure", "--keep-attention", 0, *RANKS).code == 0
    words = ["convert", files.teacher, tmp_path / "hybrid", "--attention-layers", "1"]
    assert run(*words, "--mixers-from", tmp_path / "pure").code == 0
    pure, hybrid = (load_model(tmp_path / name).state_dict() for name in ("pure", "hybrid"))
    assert load_config(tmp_path / "hybrid").full_layers == [1]
    own = {name for name in hybrid if ".self_attn." in name and ".layers.1." not in name}
    assert own
    assert all(torch.equal(hybrid[name], pure[name]) for name in own)


def test_teacher_is_evaluated_alone(files: Files, run: Run, tmp_path: Path) -> None:
    done = run("eval", files.teacher, "--text", files.text, "--out", tmp_path / "r", *EVAL[:-1], 0)
    assert (done.code, done.err) == (0, "")
    model = json.loads((tmp_path / "r" / "report.json").read_text())["models"][0]
    assert model["comparison"]["overall"]["kl"] is None
    assert model["grid"] is None


def test_prompt_comes_from_a_file(files: Files, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    done = run(
        "generate", files.student, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 3, "--seed", 5
    )
    assert done.code == 0
    assert done.out.startswith("the lazy dog")


def test_demo_makes_every_student(files: Files, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    ranks = "\n".join(f"{name}_rank = 4" for name in ("decay", "iclr", "value", "key", "gate"))
    recipe.write_text(
        f"[convert]\nattention_layers = [2]\n{ranks}\n"
        "[distill]\nvalidation_tokens = 128\n"
        f"[distill.data]\nsources = ['{files.text}']\ncontext_length = 64\nbatch_tokens = 128\n"
        "[distill.stage1]\ntokens = 256\n[distill.stage2]\ntokens = 256\n[distill.stage3]\ntokens = 128\n"
        f"[eval]\ntext = ['{files.text}']\nsplit = 'all'\ntokens = 256\n"
        "context_length = 64\nbatch_tokens = 128\n"
        "passkey_lengths = [200]\npasskey_depths = [0.5]\npasskey_samples = 1\n"
        "[demo]\npure_tokens = 128\nprompt = 'the quick'\ncompletion_tokens = 4\n"
    )
    out = tmp_path / "demo"
    done = run("demo", "--recipe", recipe, "--teacher", files.teacher, "--out", out)
    assert (done.code, done.err) == (0, "")
    models = json.loads((out / "report.json").read_text())["models"]
    assert [model["name"] for model in models] == [
        "teacher",
        "hybrid, converted",
        "hybrid, stage 1",
        "hybrid, stage 2",
        "hybrid, stage 3",
        "no attention, stage 2",
    ]
    assert [model["memory"]["attention_layers"] for model in models] == [3, 1, 1, 1, 1, 0]
    assert len({model["comparison"]["overall"]["student_nll"] for model in models}) == 6
    assert (out / "passkey.png").exists()
    assert "hrwkv chat" in done.out
    again = run("demo", "--recipe", recipe, "--teacher", files.teacher, "--out", out)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already" in again.err


@pytest.mark.parametrize(
    "command", ["convert", "select", "plan", "distill", "eval", "generate", "chat", "bench", "demo"]
)
def test_help_has_summary_defaults_and_examples(command: str, run: Run) -> None:
    done = run(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert "Examples" in done.out
    assert f"hrwkv {command} " in done.out.split("Examples")[1]


def test_help_loads_no_torch() -> None:
    """The help answers at once; torch and Transformers take seconds."""
    code = (
        "import sys; from hrwkv.cli import main; main(['distill', '--help']); main([]);"
        'sys.exit(f\'{sorted(sys.modules.keys() & {"torch", "transformers", "matplotlib", "numpy"})}\')'
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr.strip() == "[]"
    assert "hrwkv COMMAND" in done.stdout


def test_eval_reads_chats_through_the_models_template(files: Files, run: Run, tmp_path: Path) -> None:
    """Chat messages were refused with 'the teacher has no chat template', whatever the model had."""
    chats = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "why " * 60}]})
    chats.write_text(f"{line}\n" * 20)
    done = run("eval", files.student, "--text", chats, "--out", tmp_path / "report", *EVAL[:-1], 0)
    assert (done.code, done.err) == (0, "")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["facts"]["predicted tokens"] > 0
