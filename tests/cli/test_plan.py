"""``hrwkv plan``: published shapes, the tables, advice, and a calibration with a tiny teacher."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hrwkv.cli.display import count
from hrwkv.cli.plan import teacher_config
from hrwkv.convert.transfer import student_config
from hrwkv.distill.gpus import GIB, GPUS
from hrwkv.distill.plan import fits
from hrwkv.distill.plan_memory import Pair, plan_memory
from hrwkv.model.cache import HybridCache
from hrwkv.settings import ConvertSettings, DataSettings, DistillSettings, StageSettings
from tests.cli.conftest import Files, Run

LOW_MEMORY = """
[teacher]
model_type = "llama"
vocab_size = 32000
hidden_size = 2048
intermediate_size = 8192
num_hidden_layers = 6
num_attention_heads = 16
num_key_value_heads = 4
[convert]
attention_layers = [3]
[plan]
gpu = "h100"
price = 2.0
[distill]
dtype = "bfloat16"
[distill.data]
context_length = 4096
batch_tokens = 131072
[distill.stage2]
gradient_checkpointing = true
[distill.stage3]
gradient_checkpointing = true
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(LOW_MEMORY)
    return path


def test_a_21b_model_fits_one_h200_in_eight_bits_only_with_its_levers() -> None:
    """Issue 5's target: at most 135 GiB for Reka-Flash-3's shape, mode frozen-mlp, context 4096."""
    teacher = teacher_config("reka-flash-3", None)
    student = student_config(teacher, ConvertSettings(attention_layers=(8, 15, 22, 29, 36, 43)))
    pair = Pair.of(student, teacher)
    own = StageSettings(
        gradient_checkpointing=True, keep="mlp", optimiser="adamw8bit", micro_batch_tokens=4096
    )
    rows = DataSettings(context_length=4096, batch_tokens=8 * 4096)
    settings = DistillSettings(
        mode="frozen-mlp", dtype="bfloat16", frozen_dtype="float8", data=rows, stage2=own
    )
    found = plan_memory(pair, settings, stage=2)
    assert found.trained + found.frozen == pytest.approx(21.35e9, rel=0.002)
    assert found.total < 135 * GIB
    everything = replace(settings, mode="all", frozen_dtype="bfloat16")
    assert not fits(plan_memory(pair, everything, stage=2), GPUS["h200"])


def numbers(output: str, name: str) -> list[float]:
    """The numbers of a table's row."""
    row = next(line for line in output.splitlines() if line.strip().startswith(name))
    return [float(word) for word in re.findall(r"[\d.]+", row.strip()[len(name) :])]


def test_tables_sum_up_and_a_plan_that_fits_says_what_it_costs(recipe: Path, run: Run) -> None:
    small = [f"--distill.stage{stage}.micro-batch-tokens=4096" for stage in (1, 2, 3)]
    done = run("plan", recipe, *small)
    assert (done.code, done.err) == (0, "")
    parts = ("teacher", "student", "gradients", "optimiser", "activations", "logits", "reserve")
    columns = zip(*(numbers(done.out, part) for part in parts), strict=True)
    assert [sum(column) for column in columns] == pytest.approx(numbers(done.out, "sum"), abs=0.05)
    assert numbers(done.out, "h100 has") == [79.2] * 3
    hours, money = re.search(r"([\d.]+) hours on 1 x h100, ([\d.,]+) at 2 an hour", done.out).groups()
    assert float(money) == pytest.approx(2 * float(hours), abs=0.01)


def test_what_does_not_fit_gets_advice_that_fits(recipe: Path, run: Run) -> None:
    words = ("plan", recipe, "--gpu", "rtx4090")
    refused = run(*words)
    assert (refused.code, refused.err) == (1, "")
    advice = re.search(r"Does not fit in 23\.5 GiB: it fits with (.*)", refused.out)[1].split(", ")
    flags = []
    for word in advice:
        key, value = word.split(" = ")
        name = key.replace("_", "-")
        flags.append(f"--distill.{name}" if value == "true" else f"--distill.{name}={value.strip(chr(34))}")
    assert run(*words, *flags).code == 0
    # Each of the advised changes is needed.
    assert all(run(*words, *flags[:n], *flags[n + 1 :]).code == 1 for n in range(len(flags)))


def test_what_a_sequence_holds_is_what_a_cache_has(files: Files, run: Run) -> None:
    words = (
        "plan",
        "tiny-demo",
        "--teacher",
        files.teacher,
        "--gpu",
        "h100",
        "--convert.attention-layers",
        2,
    )
    config = student_config(
        teacher_config("tiny-demo", files.teacher), ConvertSettings(attention_layers=(2,))
    )
    cache = HybridCache.allocate(config, slots=1, blocks=1, block_size=1, dtype=torch.bfloat16)
    state = sum(tensor.numel() * tensor.itemsize for tensor in cache.state)
    kv = sum(tensor.numel() * tensor.itemsize for tensor in (*cache.k_cache, *cache.v_cache))
    told = re.search(r"holds (.*) bytes of state, and (.*) bytes a token", run(*words).out).groups()
    assert told == (count(state), count(kv))


def test_flag_wins_over_the_recipe(recipe: Path, run: Run) -> None:
    assert "8 x h200" in run("plan", recipe, "--gpu", "h200", "--gpus", 8, "--price", 1).out


def test_without_a_teacher_a_directory_is_asked_for(tmp_path: Path, run: Run) -> None:
    (tmp_path / "bare.toml").write_text("[distill]\nmode = 'all'\n")
    done = run("plan", tmp_path / "bare.toml", "--gpu", "h100", "--convert.keep-attention", 1)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "has no [teacher]: give the teacher's directory with --teacher" in done.err


def test_a_preset_without_distill_says_that_it_plans_the_defaults(recipe: Path, run: Run) -> None:
    """Hours of a 70B model in steps of 1024 tokens looked like somebody's recommendation."""
    words = ["--gpu", "h200"]
    assert run("plan", "qwen3-0.6b", *words).out.startswith(
        "The recipe has no [distill]: planned with the de"
    )
    assert "has no [distill]" not in run("plan", recipe, *words).out


def test_calibration_of_another_gpu_is_refused(recipe: Path, files: Files, run: Run) -> None:
    given = ("--convert.attention-layers", 2, "--distill.device", "cpu")
    done = run("plan", recipe, "--teacher", files.teacher, "--calibrate", *given)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--calibrate measures this machine (cpu), not a h100" in done.err
    done = run("plan", recipe, "--calibrate")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "give its directory with --teacher" in done.err


def test_calibration_runs_the_recipe_and_corrects_the_plan(files: Files, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[convert]\nattention_layers = [2]\ndecay_rank = 4\niclr_rank = 4\nvalue_rank = 4\nkey_rank = 4\n"
        f"gate_rank = 4\n[plan]\ngpu = 'cpu'\n[distill]\ndevice = 'cpu'\n[distill.data]\n"
        f"sources = ['{files.text}']\ncontext_length = 32\nbatch_tokens = 64\n"
    )
    words = ["plan", path, "--teacher", files.teacher, "--corrections", tmp_path / "kept" / "plan.json"]
    assert "not measured" in run(*words).out
    measured = run(*words, "--calibrate")
    assert (measured.code, measured.err) == (0, "")
    assert "measured here" in measured.out
    ratios = json.loads((tmp_path / "kept" / "plan.json").read_text())
    assert len(ratios) == 3
    assert min(ratios.values()) > 0
    # The correction is found again, and gives back what was measured.
    again = run(*words).out
    told = re.findall(r"Stage \d: ([\d.]+ ?k?) tokens/s", measured.out)
    rates = next(line for line in again.splitlines() if line.strip().startswith("tokens/s"))
    assert [word.strip() for word in re.findall(r"[\d.]+ ?k?", rates)] == [word.strip() for word in told]
