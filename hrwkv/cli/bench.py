"""``hrwkv bench``: how fast a model is served, beside what the machine allows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from cyclopts import Parameter
from rich.console import Console

from hrwkv.cli.display import Display
from hrwkv.cli.loading import choose_device, open_model, open_tokenizer
from hrwkv.settings import BenchSettings, EngineSettings

if TYPE_CHECKING:
    from hrwkv.engine.engine import Engine
    from hrwkv.model.modeling import HybridModel

EXAMPLES = """
hrwkv bench run/stage3
hrwkv bench run/stage3 --batch-sizes 1,64,256 --context 4096 --state-dtype bfloat16
hrwkv bench run/stage3 --json > bench.json
"""
Row: TypeAlias = dict[str, Any]
DECODE_HEADER = ["sequences", "context", "tokens/s", "ms a step", "floor ms", "of floor"]
PREFILL_HEADER = ["prompt", "tokens/s", "seconds", "TFLOP/s", "of matmul"]


def bench(
    model: Annotated[Path, Parameter(help="Directory of a student, or of any model that convert takes.")],
    /,
    *,
    settings: Annotated[BenchSettings, Parameter(name="*", group="Measurement")] = BenchSettings(),  # noqa: B008 (frozen)
    engine: Annotated[EngineSettings, Parameter(name="*", group="Engine")] = EngineSettings(),  # noqa: B008 (frozen)
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="One JSON object and nothing else.")
    ] = False,
) -> None:
    """Measure decoding and reading of prompts, with requests as a server's clients send them.

    A decode step's floor is the time to copy its bytes once: weights, states read and written, keys and
    values. Prompts stand beside the rate of one large matrix product. Both rates are measured first.
    """
    import torch

    from hrwkv.engine.engine import Engine
    from hrwkv.kernels.rates import copy_rate, matmul_rate

    display = Display(Console(highlight=False, soft_wrap=True, quiet=as_json))
    device = choose_device(engine.device)
    dtype = engine.dtype if engine.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    weights = open_model(model, device=device, dtype=dtype)
    rates = {"copy": copy_rate(device), "matmul": matmul_rate(device, dtype=getattr(torch, dtype))}
    decode: list[Row] = []
    prefill: list[Row] = []
    total = len(settings.batch_sizes) + len(settings.prompt_lengths)
    with (
        Engine(weights, open_tokenizer(model), engine) as running,
        display.task("Measuring", total) as task,
    ):
        for batch in settings.batch_sizes:
            task.advance(len(decode), f"{batch} sequences")
            case = {"batch": batch, "context": settings.context, "steps": settings.steps}
            decode.append(decode_row(running, weights, engine, copy_rate=rates["copy"], **case))
        for length in settings.prompt_lengths:
            task.advance(len(decode) + len(prefill), f"a prompt of {length}")
            prefill.append(prefill_row(running, weights, length=length, matmul_rate=rates["matmul"]))
    if as_json:
        place = {"device": device_name(device), "torch": torch.__version__, "dtype": dtype}
        asked = {"measurement": dataclasses.asdict(settings), "engine": dataclasses.asdict(engine)}
        print(json.dumps({**place, **asked, "rates": rates, "decode": decode, "prefill": prefill}, indent=2))
        return
    copies, multiplies = f"{rates['copy'] / 1e9:.3g} GB/s", f"{rates['matmul'] / 1e12:.3g} TFLOP/s"
    display.line(f"{device_name(device)}: copies {copies}, multiplies {multiplies} in {dtype}")
    if decode:
        display.table("Decoding", DECODE_HEADER, [decode_cells(row) for row in decode])
    if prefill:
        display.table("Reading a prompt", PREFILL_HEADER, [prefill_cells(row) for row in prefill])
    for row in (*decode, *prefill):
        if "failed" in row:
            display.line(row["failed"], "red")


def decode_row(
    engine: Engine,
    model: HybridModel,
    settings: EngineSettings,
    *,
    batch: int,
    context: int,
    steps: int,
    copy_rate: float,
) -> Row:
    """One decode measurement, or under "failed" why there is none: the other rows are still wanted."""
    from hrwkv.engine.measure import measure_decode

    row: Row = {"batch": batch, "context": context}
    try:
        found = measure_decode(engine, model, settings, batch=batch, context=context, steps=steps)
    except (ValueError, RuntimeError) as error:  # does not fit, or the device or the engine failed
        return row | {"failed": " ".join(str(error).split())}
    return row | {
        "tokens_per_second": found.tokens_per_second,
        "milliseconds": found.seconds * 1e3,
        "floor_milliseconds": found.bytes / copy_rate * 1e3,
        "of_floor": found.of_floor(copy_rate),
    }


def prefill_row(engine: Engine, model: HybridModel, *, length: int, matmul_rate: float) -> Row:
    """One measurement of a prompt, or under "failed" why there is none."""
    from hrwkv.engine.measure import measure_prefill

    row: Row = {"length": length}
    try:
        found = measure_prefill(engine, model, length=length)
    except (ValueError, RuntimeError) as error:
        return row | {"failed": " ".join(str(error).split())}
    return row | {
        "tokens_per_second": found.tokens_per_second,
        "seconds": found.seconds,
        "operations_per_second": found.operations / found.seconds,
        "of_matmul": found.utilisation(matmul_rate),
    }


def decode_cells(row: Row) -> list[str]:
    """A row of ``DECODE_HEADER``."""
    known = [str(row["batch"]), str(row["context"])]
    if "failed" in row:
        return [*known, *["-"] * 4]
    times = [f"{row[name]:.3g}" for name in ("milliseconds", "floor_milliseconds")]
    return [*known, f"{row['tokens_per_second']:.1f}", *times, f"{row['of_floor']:.1%}"]


def prefill_cells(row: Row) -> list[str]:
    """A row of ``PREFILL_HEADER``."""
    if "failed" in row:
        return [str(row["length"]), *["-"] * 4]
    speed = [f"{row['tokens_per_second']:.1f}", f"{row['seconds']:.3g}"]
    return [
        str(row["length"]),
        *speed,
        f"{row['operations_per_second'] / 1e12:.3g}",
        f"{row['of_matmul']:.1%}",
    ]


def device_name(device: str) -> str:
    """What the device calls itself."""
    import platform

    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
