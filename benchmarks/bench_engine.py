"""How near does the engine come to the memory's rate, and what does the hybrid gain over its teacher?

    python benchmarks/bench_engine.py                       # one H200: about 4 minutes, 125 GB of its memory
    python benchmarks/bench_engine.py --startup FOLDER      # and 42 GB of weights there: 3 to 6 minutes more
    python benchmarks/bench_engine.py --tiny --device cpu   # the same way through the script in a minute

Random bf16 weights in the shape of a recipe's teacher (Reka Flash 3: 44 layers) and of its hybrid (6 of them
attention), made on the device. Requests go through ``Engine.submit`` as a server's do; what is measured is
``hrwkv.engine.measure``, as for ``hrwkv bench``.

- decode: tokens a second of B sequences together; floor: weights read once, states read and written, keys and
  values read, over the copy rate measured here. "of floor" is floor / time.
- prefill: seconds from a request to its first token, the best of two after one that compiles; MFU: operations
  over ``--peak-tflops``, 989.5 for an H200's bf16.
- fit: sequences of a length that the cache of an empty engine holds.
- start: seconds from Engine() to the first token with the weights on the device, kernels compiled and tuned
  where their caches are empty; with --startup also from the start of a process, weights in the page cache.

A case that fails says why in its row. The last line is JSON.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hrwkv.cli.bench import (
    DECODE_HEADER,
    PREFILL_HEADER,
    decode_cells,
    decode_row,
    device_name,
    prefill_cells,
    prefill_row,
)
from hrwkv.cli.display import Display
from hrwkv.convert.transfer import student_config
from hrwkv.engine.build import fit_memory
from hrwkv.engine.engine import Engine
from hrwkv.engine.measure import num_fitting, random_prompt
from hrwkv.engine.request import SamplingParams
from hrwkv.kernels.rates import copy_rate, matmul_rate
from hrwkv.model.checkpoint import save_model
from hrwkv.model.config import HybridConfig
from hrwkv.model.families import config_from_teacher
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import ConvertSettings, EngineSettings

RECIPE = Path(__file__).parents[1] / "recipes" / "reka-flash-3.toml"
TINY = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 8}
TINY |= {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
STEPS = 64
# Batches at a short context, then pairs of batch and context that take seconds, not minutes, to read.
BATCHES, SHORT, LONG = (1, 8, 32, 64, 128, 256), 512, ((32, 4096), (4, 32000))
PROMPTS, FITS = (4096, 32000), (4096, 32768)
TINY_CASES: dict[str, Any] = {"batches": (1, 4), "short": 32, "long": ((2, 100),), "prompts": (64, 200)}
CASES: dict[str, Any] = {"batches": BATCHES, "short": SHORT, "long": LONG, "prompts": PROMPTS}
FIRST_TOKEN = """
import sys
from hrwkv.engine.engine import Engine
from hrwkv.engine.request import SamplingParams
from hrwkv.settings import EngineSettings
with Engine.open(sys.argv[1], EngineSettings(device=sys.argv[2])) as engine:
    assert list(engine.submit([1, 2, 3], SamplingParams(max_tokens=1)))
"""
Row = dict[str, Any]


def configs(recipe: Path, *, tiny: bool) -> tuple[HybridConfig, HybridConfig]:
    """The teacher's and its hybrid's."""
    tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
    kept = tables["convert"]["attention_layers"] if not tiny else [2]
    teacher = config_from_teacher({**tables["teacher"], **(TINY if tiny else {}), "architectures": None})
    return teacher, student_config(teacher, ConvertSettings(attention_layers=tuple(kept)))


def random_model(config: HybridConfig, *, device: str, dtype: torch.dtype) -> HybridModel:
    """Weights that keep activations of order 1 through all layers."""
    with torch.device("meta"):
        model = HybridModel(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0 if "norm" in name else 0.0)
            else:
                weight.normal_(std=0.5 * weight.shape[-1] ** -0.5)
    return model.eval().requires_grad_(requires_grad=False)


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word for each id."""
    core = Tokenizer(models.WordLevel({f" {i}": i for i in range(vocab_size)}, unk_token=" 0"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@contextmanager
def running(model: HybridModel, settings: EngineSettings) -> Iterator[Engine]:
    """An engine whose memory is free again afterwards."""
    engine = Engine(model, number_tokenizer(model.config.vocab_size), settings)
    try:
        yield engine
    finally:
        engine.close(0)
        del engine
        free()


def free() -> None:
    """Give memory without an owner back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def guarded(report: Row, name: str) -> Iterator[None]:
    """Tell a failure and go on: what comes after it is still wanted."""
    try:
        yield
    except Exception as error:
        report["failed"].append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        error.__traceback__ = None  # which holds the failed step's tensors
        free()


def tell(report: Row, table: str, row: Row) -> None:
    """Keep a row and show it at once: a run that is cut off has told what it found."""
    report[table].append(row)
    print(table, json.dumps(row), file=sys.stderr, flush=True)


def measure_model(report: Row, model: HybridModel, settings: EngineSettings, *, own: Row, cases: Row) -> None:
    """The start of an engine, prompts, then decoding."""
    pairs = [(batch, cases["short"]) for batch in cases["batches"]] + list(cases["long"])
    start = time.perf_counter()
    with running(model, settings) as engine:
        for _ in engine.submit(random_prompt(engine, 16), SamplingParams(max_tokens=1)):
            tell(report, "start", own | {"seconds": time.perf_counter() - start})
        for length in cases["prompts"]:
            row = prefill_row(engine, model, length=length, matmul_rate=report["peak"])
            tell(report, "prefill", own | row)
        for batch, context in pairs:
            case = {"batch": batch, "context": context, "steps": cases["steps"]}
            row = decode_row(engine, model, settings, copy_rate=report["copy_rate"], **case)
            tell(report, "decode", own | row)


def measure_kind(
    report: Row,
    name: str,
    config: HybridConfig,
    *,
    settings: EngineSettings,
    states: Sequence[str],
    cases: Row,
    startup_folder: Path | None = None,
) -> None:
    """Everything about one model, which is gone afterwards; prompts with the first kind of state only."""
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    model = random_model(config, device=settings.device, dtype=dtype)
    with guarded(report, f"{name}, fit"):
        report["fit"].append({"model": name, "fits": fits(model, settings)})
    for state in states:
        own_cases = cases if state == states[0] else {**cases, "prompts": ()}
        with guarded(report, f"{name}, {state} state"):
            own = {"model": name, "state": state}
            measured = dataclasses.replace(settings, state_dtype=state)
            measure_model(report, model, measured, own=own, cases=own_cases)
    if startup_folder is not None:
        with guarded(report, "startup"):
            report["startup"] = startup(model, startup_folder, settings.device)


def fits(model: HybridModel, settings: EngineSettings) -> dict[int, int]:
    """How many sequences of each length; more may run at once than in the measurements."""
    sizes = fit_memory(model, dataclasses.replace(settings, max_sequences=4096, step_tokens=4096))
    memory = {"slots": sizes.slots, "blocks": sizes.blocks, "block_size": sizes.block_size}
    return {length: num_fitting(length, **memory) for length in FITS}


def startup(model: HybridModel, folder: Path, device: str) -> list[float]:
    """Seconds of two processes, each from its start to its first token; the weights stay in ``folder``."""
    with tempfile.TemporaryDirectory() as companions:
        number_tokenizer(model.config.vocab_size).save_pretrained(companions)
        save_model(model, folder, companions=companions)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_TOKEN, str(folder), device], check=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def show(report: Row) -> None:
    """The tables."""
    display, lead = Display(), ["model", "state"]
    display.line(f"{report['device']}: copies {report['copy_rate'] / 1e12:.2f} TB/s")
    display.line(f"one product of large matrices {report['matmul_rate'] / 1e12:.0f} TFLOP/s")
    rows = [[row["model"], row["state"], *decode_cells(row)] for row in report["decode"]]
    display.table("Decode", [*lead, *DECODE_HEADER], rows)
    rows = [[row["model"], row["state"], *prefill_cells(row)] for row in report["prefill"]]
    display.table("Prefill", [*lead, *PREFILL_HEADER[:-1], "MFU"], rows)
    rows = [[row["model"], *map(str, row["fits"].values())] for row in report["fit"]]
    display.table("Sequences that fit", ["model", *map(str, FITS)], rows)
    rows = [[row["model"], row["state"], f"{row['seconds']:.1f}"] for row in report["start"]]
    display.table("Start to first token, weights on the device", [*lead, "seconds"], rows)
    if report["startup"]:
        display.line(f"process to first token: {', '.join(f'{s:.1f} s' for s in report['startup'])}")
    for line in report["failed"] + [
        row["failed"] for row in report["decode"] + report["prefill"] if "failed" in row
    ]:
        display.line(line, "red")


def main() -> None:
    """Measure, show, and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--batches", type=int, nargs="*", help="batches at the short context")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--step-tokens", type=int, default=EngineSettings.step_tokens)
    parser.add_argument("--peak-tflops", type=float, default=989.5)
    parser.add_argument("--startup", type=Path, help="new folder for the weights")
    options = parser.parse_args()
    device = options.device
    cases = {**(TINY_CASES if options.tiny else CASES), "steps": options.steps}
    if options.batches is not None:
        cases["batches"] = options.batches
    states = ("float32", "bfloat16") if device == "cuda" else ("float32",)
    cache = 2**26 if device == "cpu" else None
    settings = EngineSettings(device=device, cache_bytes=cache, step_tokens=options.step_tokens)
    teacher, hybrid = configs(options.recipe, tiny=options.tiny)
    report: Row = {"device": device_name(device), "torch": torch.__version__, "command": sys.argv[1:]}
    report |= {"copy_rate": copy_rate(device), "peak": options.peak_tflops * 1e12}
    report["matmul_rate"] = matmul_rate(device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    report |= {"decode": [], "prefill": [], "fit": [], "start": [], "startup": None, "failed": []}
    with guarded(report, "hybrid"):
        folder = options.startup
        measure_kind(
            report, "hybrid", hybrid, settings=settings, states=states, cases=cases, startup_folder=folder
        )
    free()
    with guarded(report, "teacher"):
        alone = {**cases, "batches": cases["batches"][:1]}
        measure_kind(report, "teacher", teacher, settings=settings, states=states[:1], cases=alone)
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
