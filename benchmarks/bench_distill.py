"""Distillation steps at a model's real shape: tokens a second, memory by part, MFU, hours of a recipe.

    python benchmarks/bench_distill.py                                  Reka-Flash-3, frozen-mlp, one GPU
    python benchmarks/bench_distill.py --cases 2:mlp:1 --profile        one case, and its kernels by time
    python benchmarks/bench_distill.py --mode all --shape qwen3-8b --optimiser adamw8bit --cases 2:nothing:2
    torchrun --nproc-per-node 2 benchmarks/bench_distill.py --mode all --shape qwen3-8b --cases 2:nothing:2

Weights are random and made on the GPU, layer by layer, in the form in which they are trained; steps are the
trainer's own (stage functions, engine, optimiser). Tokens are random, rows are packed with documents. A case
is ``stage:keep:rows``: rows of --context tokens in a micro-batch; ``all`` as keep turns checkpointing off.
The floor is the time of the necessary operations (hrwkv/model/flops.py) at the chip's stated bf16 rate, so x
floor is 1 / MFU; 8-bit products may go below it. About 3 minutes on an H200 with the default cases, of which
one is compilation and the making of weights. A case that fails says so and stops no other. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hrwkv.convert.initialise import rank_sizes
from hrwkv.distill.frozen import EIGHT_BITS, FROZEN, Quantised, Shared
from hrwkv.distill.optimiser import build_optimiser, optimiser_state, set_learning_rate
from hrwkv.distill.parallel import Engine, Ranks, joined, local, release, start
from hrwkv.distill.parallel.fsdp import shard
from hrwkv.distill.stages import STAGES, StepInput, StepOptions, set_trainable
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.linear import FrozenLinear
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.flops import PEAK_BF16, stage_operations, utilisation
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import ConvertSettings, StageSettings

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 1,
}
# Tokens of the published recipe (README of RWKVInside's Reka-Flash-3 run).
BUDGET = {1: 98e6, 2: 283e6}
COLUMNS = ("tokens/s", "mfu", "x_floor", "step_s", "peak_gib", "hours")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    stage: int
    keep: str
    rows: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """``stage:keep:rows``."""
        stage, keep, rows = text.split(":")
        return cls(int(stage), keep, int(rows))

    def __str__(self) -> str:
        return f"stage {self.stage}, keep {self.keep}, {self.rows} rows"


def configs(shape: str, layers: int | None) -> tuple[HybridConfig, HybridConfig]:
    """Student and teacher of a shape; ``layers`` takes the first ones only."""
    recipe: dict[str, Any] = {"teacher": TINY, "convert": {"attention_layers": [2]}}
    if shape != "tiny":
        recipe = tomllib.loads((RECIPES / f"{shape}.toml").read_text())
    values = {name: value for name, value in recipe["teacher"].items() if name != "model_type"}
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    values["qk_norm"] = recipe["teacher"].get("model_type") == "qwen3"
    kept = [layer for layer in recipe["convert"]["attention_layers"] if layer < values["num_hidden_layers"]]
    kinds = [FULL if layer in kept else LINEAR for layer in range(values["num_hidden_layers"])]
    teacher = HybridConfig(**values)
    ranks = rank_sizes(teacher, ConvertSettings(attention_layers=tuple(kept) or (1,)))
    return HybridConfig(**values, layer_types=kinds, attention_rope=False, **ranks), teacher


def random_weight(shape: torch.Size, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ones for norms, else numbers of a size that leaves activations finite through all layers."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(0.5 * shape[-1] ** -0.5)


def fill(model: HybridModel, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device weights, one after another."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.values.is_meta:
            shape = module.values.shape
            module.fill(random_weight(shape, name, dtype=torch.bfloat16, device=device))
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                own = random_weight(parameter.shape, f"{name}.{leaf}", dtype=dtype, device=device)
                setattr(module, leaf, nn.Parameter(own, requires_grad=False))
    model.tie_weights()


def build(options: argparse.Namespace, ranks: Ranks, dtype: torch.dtype) -> tuple[HybridModel, HybridModel]:
    """Teacher and student of the asked shape on this process's device."""
    student_config, teacher_config = configs(options.shape, options.layers)
    with torch.device("meta"):
        teacher, student = HybridModel(teacher_config), HybridModel(student_config)
    narrow = EIGHT_BITS.get(options.frozen_dtype)
    if narrow is not None and options.mode == "frozen-mlp" and ranks.world == 1:
        Quantised(narrow, ranks.device).prepare(teacher)
    if ranks.world > 1:
        return (
            sharded(teacher, ranks, dtype=dtype, narrow=dtype),
            sharded(student, ranks, dtype=torch.float32, narrow=dtype),
        )
    fill(teacher, dtype=dtype, device=ranks.device)
    if options.mode == "frozen-mlp":
        shared = Shared(teacher)
        shared.prepare(student)
        theirs = dict(teacher.named_parameters())
        for name, _ in list(student.named_parameters()):
            if FROZEN.fullmatch(name):
                owner, _, leaf = name.rpartition(".")
                setattr(student.get_submodule(owner), leaf, theirs[name])
    fill(student, dtype=torch.float32, device=ranks.device)
    return teacher.eval(), student


def sharded(model: HybridModel, ranks: Ranks, *, dtype: torch.dtype, narrow: torch.dtype) -> HybridModel:
    """A model with random shards in ``dtype``, made on each process; blocks are gathered in ``narrow``."""
    shard(model.to(dtype), init_device_mesh(ranks.device.type, (ranks.world,)), dtype=narrow)
    model.to_empty(device=ranks.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = local(parameter)
            own.copy_(random_weight(own.shape, name, dtype=dtype, device=ranks.device))
        # FSDP takes the module that is called first for the root, and stage 1 calls blocks.
        with StepOptions(ranks, dtype=narrow).autocast():
            one = torch.zeros(1, dtype=torch.int64, device=ranks.device)
            model(one, TokenBatch.from_lengths([1], device=ranks.device))
    release(model)
    return model.eval()


def micro_batches(
    case: Case, options: argparse.Namespace, ranks: Ranks, vocab_size: int
) -> Iterator[StepInput]:
    """A step's micro-batches: random tokens, each row packed with one to four documents."""
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(options.micro_batches):
        lengths: list[int] = []
        for _ in range(case.rows):
            count = int(torch.randint(0, 4, (), generator=generator))
            cuts = torch.randint(1, options.context, (count,), generator=generator).unique().tolist()
            ends = [0, *cuts, options.context]
            lengths += [after - before for before, after in zip(ends, ends[1:], strict=False)]
        tokens = case.rows * options.context
        ids = torch.randint(vocab_size, (tokens,), generator=generator)
        whole = tokens * ranks.world * options.micro_batches
        batch = TokenBatch.from_lengths(lengths, device=ranks.device)
        yield StepInput(ids.to(ranks.device), batch, num_tokens=whole, num_labels=whole)


def step(
    engine: Engine, teacher: HybridModel, case: Case, inputs: list[StepInput], options: StepOptions
) -> Tensor:
    """One step as the trainer takes it; returns the loss, unread."""
    set_learning_rate(engine.optimiser, 1e-3)
    losses = []
    for number, part in enumerate(inputs):
        with engine.micro_batch(last=number == len(inputs) - 1):
            losses.append(STAGES[case.stage].step(teacher, engine.student, part, options).loss)
    engine.step(1.0)
    return torch.stack(losses).sum()


def memory(device: torch.device, *, peak: bool = False) -> float:
    """GiB allocated, now or at most; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30


def now(device: torch.device) -> float:
    """Seconds, after all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    case: Case, options: argparse.Namespace, models: tuple[HybridModel, HybridModel], ranks: Ranks
) -> dict[str, float]:
    """Steps of one case: one for compilation, then --steps by the clock."""
    teacher, student = models
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    set_trainable(student, stage=STAGES[case.stage], mode=options.mode)
    student.train()
    student.model.gradient_checkpointing = case.keep != "all" and case.stage != 1
    student.model.keep = case.keep  # type: ignore[assignment]
    settings = StageSettings(optimiser=options.optimiser)
    engine = start(
        student,
        build_optimiser(student, settings),
        ranks,
        kind="fsdp2",
        dtype=dtype,
        path=Path(),
        read_state=optimiser_state,
    )
    run = StepOptions(ranks, dtype=dtype, backward=engine.backward)
    inputs = list(micro_batches(case, options, ranks, student.config.vocab_size))
    weights = memory(ranks.device)
    step(engine, teacher, case, inputs, run)
    engine.discard()
    with_state = memory(ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = now(ranks.device)
    for _ in range(options.steps):
        loss = step(engine, teacher, case, inputs, run)
    seconds = (now(ranks.device) - began) / options.steps
    if options.profile:
        profile(engine, teacher, case, inputs, run)
    engine.discard()
    tokens = inputs[0].num_tokens
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    operations = stage_operations(
        student.config, teacher.config, stage=case.stage, mode=options.mode, context_length=options.context
    )
    peak = PEAK_BF16.get(options.chip, PEAK_BF16["H200"]) * ranks.world
    share = utilisation(operations, tokens_per_second=tokens / seconds, peak=peak)
    return {
        "tokens/s": tokens / seconds,
        "mfu": share,
        "x_floor": 1 / share,
        "step_s": seconds,
        "peak_gib": memory(ranks.device, peak=True),
        "weights_gib": weights,
        "optimiser_gib": with_state - weights,
        "gradients_gib": trained * 4 / ranks.world / 2**30,
        "activations_gib": memory(ranks.device, peak=True) - with_state - trained * 4 / ranks.world / 2**30,
        "hours": BUDGET.get(case.stage, 0.0) * seconds / tokens / 3600,
        "loss": float(loss),
    }


def profile(
    engine: Engine, teacher: HybridModel, case: Case, inputs: list[StepInput], options: StepOptions
) -> None:
    """Print where the time of a step with one micro-batch goes."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as record:
        step(engine, teacher, case, inputs[:1], options)
        now(options.ranks.device)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    if options.ranks.is_first:
        print(record.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70))


def attempt(
    case: Case, options: argparse.Namespace, models: tuple[HybridModel, HybridModel], ranks: Ranks
) -> dict[str, Any]:
    """A case's row; a failure is told, and its memory given back."""
    row: dict[str, Any]
    try:
        row = dict(measure(case, options, models, ranks))
    except Exception as error:  # out of memory, a kernel's refusal: any case may fail for its own reason
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    models[1].zero_grad(set_to_none=True)
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def report(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Build once, measure each case."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    began = now(ranks.device)
    models = build(options, ranks, dtype)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "gpus": ranks.world,
        "options": vars(options),
        "weights_gib": memory(ranks.device),
        "build_s": round(now(ranks.device) - began, 1),
    }
    result["rows"] = {}
    for case in options.cases:
        result["rows"][str(case)] = row = attempt(case, options, models, ranks)
        # At once: a run that is cut off has told what it found.
        print(case, json.dumps(row), file=sys.stderr, flush=True)
    best = {
        stage: min((row["hours"] for case, row in zip(options.cases, result["rows"].values(), strict=True)
                    if case.stage == stage and "hours" in row), default=None)
        for stage in BUDGET
    }  # fmt: skip
    if None not in best.values():
        result["hours"] = sum(best.values())
    options.cases = [str(case) for case in options.cases]
    result["seconds"] = round(now(ranks.device) - began, 1)
    return result


def main() -> None:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="reka-flash-3", help="a recipe's name, or tiny")
    parser.add_argument("--layers", type=int, help="the first layers only")
    parser.add_argument("--mode", choices=["frozen-mlp", "all"], default="frozen-mlp")
    parser.add_argument("--frozen-dtype", choices=["bfloat16", *EIGHT_BITS], default="float8")
    parser.add_argument("--optimiser", choices=["adamw", "adamw8bit"], default="adamw")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=2, help="accumulated in a step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--chip", choices=PEAK_BF16, default="H200", help="whose stated rate MFU refers to")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--profile", action="store_true")
    default = ["1:all:8", "2:nothing:4", "2:stream:2", "2:mlp:2", "2:mixer:1"]
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[Case.parse(text) for text in default])
    options = parser.parse_args()
    with joined(options.device) as ranks:
        result = report(options, ranks)
        if not ranks.is_first:
            return
    print(f"{result['device']} x {result['gpus']}, torch {result['torch']}, {result['seconds']} s in all\n")
    print("| case | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for name, row in result["rows"].items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + f" | {row.get('failed', '')}")
    if "hours" in result:
        print(f"\n98M tokens of stage 1 and 283M of stage 2 at the best rates: {result['hours']:.1f} hours")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
