"""The plan's memory and rates beside those that bench_distill.py measured; needs no GPU.

    python benchmarks/bench_distill.py ... | tee result.txt      on the GPUs
    python benchmarks/bench_plan.py result.txt ...               anywhere, seconds

Each file's last line is bench_distill's JSON. Ratios are planned over measured; the goals are memory within
10 % and time within 20 % (floor: 1). Memory is compared without the plan's reserve, which stands for what the
allocator does not count. A case that failed there is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench_distill import configs

from hrwkv.distill.gpus import GPUS, named_like
from hrwkv.distill.plan_memory import Pair, plan_memory
from hrwkv.distill.plan_time import tokens_per_second
from hrwkv.settings import DataSettings, DistillSettings, StageSettings

CASE = re.compile(r"stage (\d), keep (\w+), (\d+) rows")
GIB = 2**30
COLUMNS = ("peak_gib", "planned_gib", "memory_ratio", "tokens/s", "planned_tokens/s", "rate_ratio", "floor")


def settings_of(case: re.Match[str], options: dict[str, Any], *, gpus: int, dtype: str) -> DistillSettings:
    """The recipe that a case of bench_distill is a step of."""
    context, rows, keep = options["context"], int(case[3]), case[2]
    own = StageSettings(
        context_length=context,
        batch_tokens=context * rows * options["micro_batches"] * gpus,
        micro_batch_tokens=context * rows,
        gradient_checkpointing=keep != "all",
        keep="nothing" if keep == "all" else keep,
        optimiser=options["optimiser"],
    )
    # bench_distill ignores the frozen dtype where MLPs train.
    frozen = options["frozen_dtype"] if options["mode"] == "frozen-mlp" else "bfloat16"
    return DistillSettings(
        mode=options["mode"],
        dtype=dtype,
        frozen_dtype=frozen,
        data=DataSettings(context_length=context, batch_tokens=context),
        stage1=own,
        stage2=own,
    )


def compare(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row for each case of one result."""
    options, gpus = result["options"], result["gpus"]
    gpu = named_like(result["device"]) or GPUS["cpu"]
    dtype = "float32" if gpu.name == "cpu" else "bfloat16"
    pair, rows = Pair.of(*configs(options["shape"], options["layers"])), {}
    for name, measured in result["rows"].items():
        case = CASE.fullmatch(name)
        if case is None or "failed" in measured:
            continue
        settings, stage = settings_of(case, options, gpus=gpus, dtype=dtype), int(case[1])
        memory = plan_memory(pair, settings, stage=stage, gpus=gpus)
        rate = tokens_per_second(pair, settings, stage=stage, gpu=gpu, gpus=gpus)
        peak = measured["peak_gib"]
        rows[f"{options['shape']}, {options['mode']}, {gpus} x {gpu.name}, {name}"] = {
            "peak_gib": peak,
            "planned_gib": memory.total / GIB,
            "memory_ratio": memory.total / GIB / peak if peak else None,
            "tokens/s": measured["tokens/s"],
            "planned_tokens/s": rate,
            "rate_ratio": rate / measured["tokens/s"],
            "floor": 1.0,
            "parts_gib": {part: size / GIB for part, size in memory.parts.items()},
        }
    return rows


def main() -> None:
    """Compare, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="outputs of bench_distill.py")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for path in options.results:
        rows |= compare(json.loads(path.read_text().strip().splitlines()[-1]))
    print("| case | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for name, row in rows.items():
        cells = ["" if row[column] is None else f"{row[column]:.4g}" for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
