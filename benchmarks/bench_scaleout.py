"""What do two GPUs make of one's work, and which engine does it best? Qwen3-8B's shape, all weights trained.

    python benchmarks/bench_scaleout.py                              # two GPUs, about 3 min, 50 GB of disk
    python benchmarks/bench_scaleout.py --only fsdp2-36 zero1-36     # H200s: over 100 GiB a GPU
    python benchmarks/bench_scaleout.py --device cpu --tiny --tokens 128 --context 64 --only alone-6 zero1-6

The last proves the script and gives no figures. A case KIND-LAYERS is a process group of its own under
torchrun, so that one that fails or hangs costs only its own row: ``alone`` is one process, the rest are
``--gpus`` processes with the engine of that name. Teacher and student are directories of random bf16 weights,
made once for each number of layers and opened as a run opens them. A
step is ``distill_step`` (KL, both heads) on random tokens, the same number on each GPU, then clip and AdamW.

Columns: tokens/s of all GPUs together, median of the steps after the warm-up; ratio to ``alone`` of the same
layers, the goal being 1.85 of two; floor_ms, the time of the necessary products at 989 TFLOP/s a GPU (two
operations for each weight of a product and token in the teacher, six in the student; embedding, attention
scores, recurrence and recomputation are not counted); of floor, which is the model FLOPs utilisation;
counted_gib, weights, gradients and AdamW's state of one GPU by their number; peak_gib, what was allocated.
The last line is JSON.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from hrwkv.convert.transfer import student_config
from hrwkv.distill.optimiser import build_optimiser, optimiser_state
from hrwkv.distill.parallel import Kind, Ranks, joined, open_model, start
from hrwkv.distill.stages import STAGES, StepOptions, distill_step, split_rows, trains
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import expected_shapes, load_config
from hrwkv.model.config import HybridConfig
from hrwkv.model.families import config_from_teacher
from hrwkv.settings import ConvertSettings, StageSettings

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen3-8b.toml"
CASES = ("alone-12", "fsdp2-12", "zero2-12", "zero1-12", "fsdp2-36", "zero2-36")
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PEAK_FLOPS = 989e12
GIB = 2**30
COLUMNS = (
    "case",
    "tokens/s",
    "ratio",
    "step_ms",
    "floor_ms",
    "of floor",
    "counted_gib",
    "peak_gib",
    "open_s",
)
Row = dict[str, Any]


def configs(layers: int, *, tiny: bool) -> tuple[HybridConfig, HybridConfig]:
    """Teacher and student of the recipe with so many layers, every sixth of them attention."""
    values = tomllib.loads(RECIPE.read_text())["teacher"] | {"num_hidden_layers": layers}
    teacher = config_from_teacher(values | TINY if tiny else values)
    return teacher, student_config(teacher, ConvertSettings(keep_attention=max(layers // 6, 1)))


def write_random(path: Path, config: HybridConfig) -> None:
    """A model directory whose bf16 weights repeat one block of N(0, 0.02^2): as fast as the disk writes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    offset, header = 0, {}
    for name, shape in expected_shapes(config).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = torch.randn(2**25, generator=torch.Generator().manual_seed(0)) * 0.02
    block = memoryview(values.bfloat16().view(torch.uint8).numpy())
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, offset, len(block)):
            file.write(block[: offset - begin])


def product_weights(config: HybridConfig) -> int:
    """Weights that every token is multiplied with: matrices, without the embedding and r_k."""
    return sum(
        math.prod(shape)
        for name, shape in expected_shapes(config).items()
        if len(shape) > 1 and "embed_tokens" not in name and not name.endswith("r_k")
    )


def counted_bytes(kind: str, world: int, *, student: int, teacher: int) -> float:
    """Bytes on one GPU: fp32 masters (4), gradients (4) and moments (8), bf16 copies (2), the teacher (2)."""
    whole = {"alone": 0, "fsdp2": 0, "zero1": 6, "zero2": 2, "zero3": 0}[kind]  # of each student weight
    cut = {"alone": 16, "fsdp2": 16, "zero1": 12, "zero2": 16, "zero3": 18}[kind]
    return student * (whole + cut / world) + 2 * teacher / world


def measure(kind: str, folder: Path, ranks: Ranks, arguments: argparse.Namespace) -> Row:
    """One case: seconds of each step and the peak of memory, of this process."""
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    engine_kind: Kind = "fsdp2" if kind == "alone" else kind  # type: ignore[assignment]
    begin = time.perf_counter()
    unread = load_config(folder / "student").unread_parameters
    teacher = open_model(folder / "teacher", ranks, dtype=dtype)
    student = open_model(
        folder / "student",
        ranks,
        dtype=dtype,
        trains=lambda name: trains(name, stage=STAGES[2], mode="all", unread=unread),
        kind=engine_kind,
    ).train()
    student.model.gradient_checkpointing = not arguments.keep_activations
    engine = start(
        student,
        build_optimiser(student, StageSettings(learning_rate=1e-5)),
        ranks,
        kind=engine_kind,
        dtype=dtype,
        path=folder / "student",
        read_state=optimiser_state,
    )
    opened = time.perf_counter() - begin
    context = arguments.context
    rows = arguments.tokens // context * ranks.world
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(student.config.vocab_size, (rows * context,), generator=generator)
    batch = TokenBatch.from_lengths([context] * rows)
    inputs = split_rows(token_ids, batch, context_length=context, ranks=ranks)
    options = StepOptions(ranks, dtype=dtype, backward=engine.backward)
    seconds = []
    for _ in range(arguments.warm_up + arguments.steps):
        begin = time.perf_counter()
        with engine.micro_batch(last=True):
            result = distill_step(teacher, student, inputs, options)
        engine.step(1.0)
        loss = float(result.loss)  # waits for the device
        seconds.append(time.perf_counter() - begin)
    assert math.isfinite(loss), f"the loss is {loss}"
    peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else 0
    return {"seconds": seconds, "peak": peak, "opened": opened, "tokens": rows * context, "loss": loss}


def run_worker(arguments: argparse.Namespace) -> None:
    """Under torchrun: measure one case; the first process prints what it found."""
    kind = arguments.worker.partition("-")[0]
    with joined(arguments.device) as ranks:
        found = measure(kind, arguments.folder, ranks, arguments)
        if ranks.is_first:
            print(json.dumps(found))


def run_case(case: str, folder: Path, arguments: argparse.Namespace) -> Row:
    """Start a case under torchrun and make its row."""
    kind, _, layers = case.partition("-")
    world = 1 if kind == "alone" else arguments.gpus
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", __file__]
    options = [f"--worker={case}", f"--folder={folder}", f"--device={arguments.device}"]
    for name in ("tokens", "context", "steps", "warm_up"):
        options.append(f"--{name.replace('_', '-')}={getattr(arguments, name)}")
    options += ["--keep-activations"] if arguments.keep_activations else []
    done = subprocess.run(
        [sys.executable, *launcher, *options],
        capture_output=True,
        text=True,
        timeout=arguments.timeout,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(errors[0] if errors else f"exit status {done.returncode}")
    found = json.loads(lines[-1])
    teacher, student = configs(int(layers), tiny=arguments.tiny)
    step = statistics.median(found["seconds"][arguments.warm_up :])
    work = 6 * product_weights(student) + 2 * product_weights(teacher)
    floor = work * found["tokens"] / world / PEAK_FLOPS
    sizes = [sum(map(math.prod, expected_shapes(config).values())) for config in (student, teacher)]
    return {
        "case": case,
        "tokens/s": found["tokens"] / step,
        "step_ms": step * 1e3,
        "floor_ms": floor * 1e3,
        "of floor": floor / step,
        "counted_gib": counted_bytes(kind, world, student=sizes[0], teacher=sizes[1]) / GIB,
        "peak_gib": found["peak"] / GIB,
        "open_s": found["opened"],
        "loss": found["loss"],
        "seconds": found["seconds"],
    }


def run_all(arguments: argparse.Namespace) -> list[Row]:
    """Every case in turn, with the directories that it needs."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.disk) as name:
        for case in arguments.only:
            folder = Path(name) / case.partition("-")[2]
            try:
                if not folder.exists():
                    folder.mkdir()
                    for role, config in zip(
                        ("teacher", "student"), configs(int(folder.name), tiny=arguments.tiny), strict=True
                    ):
                        write_random(folder / role, config)
                row = run_case(case, folder, arguments)
                alone = next((other for other in rows if other["case"] == f"alone-{folder.name}"), None)
                row["ratio"] = row["tokens/s"] / alone["tokens/s"] if alone and "tokens/s" in alone else None
            except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                row = {"case": case, "error": str(error)[:300]}
            rows.append(row)
            show(row)
    return rows


def show(row: Row) -> None:
    """One line of the table."""
    cells = [row.get(column) for column in COLUMNS]
    text = [f"{cell:.3f}" if isinstance(cell, float) else str(cell or "") for cell in cells]
    print(" | ".join(text) + (f"  {row['error']}" if "error" in row else ""), flush=True)


def main() -> None:
    """Measure, print a table, end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), help="KIND-LAYERS, default: %(default)s")
    parser.add_argument("--gpus", type=int, default=2, help="processes of every case but alone")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step on each GPU")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--keep-activations", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--timeout", type=int, default=120, help="seconds of a case")
    parser.add_argument(
        "--disk", help="where the random models lie for the time, default: the system's folder"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments)
        return
    print(" | ".join(COLUMNS))
    rows = run_all(arguments)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    print(
        json.dumps({"device": device, "torch": torch.__version__, "tokens": arguments.tokens, "rows": rows})
    )


if __name__ == "__main__":
    main()
