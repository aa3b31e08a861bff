"""What does a turn of a conversation cost, with kept prefixes and without?

    python benchmarks/bench_conversations.py                          # one H200: about 2 minutes, 50 GB
    python benchmarks/bench_conversations.py --layers 12 --turns 4    # less of the model: half a minute
    python benchmarks/bench_conversations.py --model DIRECTORY --device cpu --question 24 --answer 16

Random bf16 weights in the shape of a recipe's hybrid (Reka Flash 3), or a model's directory. A client asks,
reads the whole answer, and sends all of it with its next question, through ``Engine.submit``.

- turns: tokens that were read, and seconds from the request to its first token; floor: the same for a request
  that has nothing but the question.
- beside: milliseconds between two tokens of ``--beside`` sequences that run while other requests come and are
  kept, each with a prompt of its own; the copies to the host should cost them nothing.
- host: seconds for which a copy of one sequence to the host and back holds up the host, and until it is done.

A case that fails says why. The last line is JSON.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_engine import RECIPE, TINY, configs, device_name, free, guarded, number_tokenizer, random_model
from rich.console import Console
from rich.table import Table

from hrwkv.engine.engine import Engine
from hrwkv.engine.measure import random_prompt
from hrwkv.engine.request import SamplingParams
from hrwkv.model.cache import HostPages, HybridCache
from hrwkv.model.checkpoint import load_model
from hrwkv.model.config import LINEAR
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import EngineSettings

Row = dict[str, Any]


def seconds_to_first(engine: Engine, prompt: list[int], count: int) -> tuple[float, tuple[int, ...]]:
    """Time from a request to its first token, and all its tokens."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    start, first, tokens = time.perf_counter(), 0.0, ()
    for event in engine.submit(prompt, params):
        first = first or time.perf_counter() - start
        tokens += event.tokens
    return first, tokens


def converse(engine: Engine, *, turns: int, question: int, answer: int) -> list[Row]:
    """One conversation; the questions are the engine's own random ids."""
    rows, prompt = [], []
    for turn in range(turns):
        prompt = [*prompt, *random_prompt(engine, question)]
        before = engine.stats()
        seconds, tokens = seconds_to_first(engine, prompt, answer)
        after = engine.stats()
        asked, reused = (
            getattr(after, name) - getattr(before, name) for name in ("prompt_tokens", "prompt_tokens_reused")
        )
        rows.append({"turn": turn + 1, "prompt": asked, "read": asked - reused, "seconds": seconds})
        prompt += tokens
    return rows


def between_tokens(engine: Engine, *, beside: int, prompt: int, requests: int) -> float:
    """Mean seconds between two tokens of ``beside`` sequences while requests of one token come and go."""
    longest = SamplingParams(max_tokens=requests * 4, temperature=0.0, ignore_eos=True)
    running = [engine.submit(random_prompt(engine, 64), longest) for _ in range(beside)]
    for _ in range(4):  # the shapes of the steps to come are compiled
        seconds_to_first(engine, list(random_prompt(engine, prompt)), 1)
    while sum(engine.stats().first_token.counts) < beside or engine.stats().queued:
        time.sleep(0.001)
    before = engine.stats().inter_token
    for _ in range(requests):
        seconds_to_first(engine, list(random_prompt(engine, prompt)), 1)
    after = engine.stats().inter_token
    for request in running:
        request.cancel()
    return (after.total - before.total) / (sum(after.counts) - sum(before.counts))


def host_copies(model: HybridModel, *, context: int, device: str) -> list[Row]:
    """A sequence of ``context`` tokens to the host and back, as the engine does it."""
    blocks = -(-context // 64)
    dtype = model.lm_head.weight.dtype
    cache = HybridCache.allocate(
        model.config, slots=1, blocks=blocks, block_size=64, device=device, dtype=dtype
    )
    pools = [*cache.k_cache, *cache.v_cache]
    state = sum(each[0].nbytes for each in cache.state)
    page_bytes = sum(pool[0].nbytes for pool in pools) or state
    states = -(-state // page_bytes)
    count = states + (blocks if pools else 0)
    start = time.perf_counter()
    pages = HostPages(cache, count, page_bytes=page_bytes, num_ready=count)
    lock = time.perf_counter() - start
    pairs = [(block, states + block) for block in range(blocks)] if pools else []
    place = {"context": context, "mib": count * page_bytes / 2**20, "lock_seconds": lock}
    rows = []
    for name, copy in (("out", pages.save), ("in", pages.load)):
        times = []
        for _ in range(5):
            wait_for(device)
            start = time.perf_counter()
            copy(0, state=list(range(states)), blocks=pairs)
            handed = time.perf_counter() - start
            wait_for(device)
            times.append((handed, time.perf_counter() - start))
        handed, done = (sorted(column)[2] for column in zip(*times, strict=True))
        rows.append(place | {"way": name, "host_seconds": handed, "seconds": done})
    return rows


def wait_for(device: str) -> None:
    """Until the device has done all."""
    if device == "cuda":
        torch.cuda.synchronize()


def open_or_make(options: argparse.Namespace) -> HybridModel:
    """The directory's model, or random weights."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    if options.model is not None:
        return load_model(options.model, dtype=dtype, device=options.device)
    _, hybrid = configs(options.recipe, tiny=options.tiny)
    if options.layers is not None:
        kinds = hybrid.layer_types[: options.layers]
        hybrid = dataclasses.replace(hybrid, num_hidden_layers=options.layers, layer_types=kinds)
    return random_model(hybrid, device=options.device, dtype=dtype)


def show(report: Row) -> None:
    """The tables."""
    console = Console(width=120)
    table = Table("turn", "prompt", "read", "read, kept", "seconds", "kept", "ratio", "floor", title="Turns")
    for off, on in zip(report.get("off", []), report.get("on", []), strict=False):
        cells = [off["turn"], off["prompt"], off["read"], on["read"]]
        times = [off["seconds"], on["seconds"], off["seconds"] / on["seconds"], report["floor"]]
        table.add_row(*map(str, cells), *(f"{value:.4g}" for value in times))
    console.print(table)
    table = Table("context", "MiB", "way", "host ms", "ms", "GB/s", "locking, s", title="Copies")
    for row in report["copies"]:
        times = [row["host_seconds"] * 1e3, row["seconds"] * 1e3, row["mib"] * 2**20 / row["seconds"] / 1e9]
        cells = [f"{value:.3g}" for value in (*times, row["lock_seconds"])]
        table.add_row(str(row["context"]), f"{row['mib']:.0f}", row["way"], *cells)
    console.print(table)
    for name, seconds in report["beside"].items():
        console.print(f"between tokens beside other requests, {name}: {seconds * 1e3:.3g} ms")
    for line in report["failed"]:
        console.print(line)


def main() -> None:
    """Measure, show, and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--model", type=Path, help="a directory instead of random weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help=f"tiny sizes, to try the script: {len(TINY)} fields"
    )
    parser.add_argument("--layers", type=int, help="of the model's, the first ones only")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--question", type=int, default=400, help="tokens")
    parser.add_argument("--answer", type=int, default=100, help="tokens")
    parser.add_argument("--beside", type=int, default=32, help="sequences that run; 0 leaves it out")
    parser.add_argument("--prefix-cache-bytes", type=int, default=2**32)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = open_or_make(options)
    kinds = model.config.layer_types or []
    layers = f"{kinds.count(LINEAR)} linear, {len(kinds) - kinds.count(LINEAR)} attention"
    report: Row = {"device": device_name(options.device), "torch": torch.__version__, "layers": layers}
    report |= {"command": sys.argv[1:], "beside": {}, "copies": [], "failed": []}
    cache = 2**28 if options.device == "cpu" else None
    case = {"turns": options.turns, "question": options.question, "answer": options.answer}
    for context in (1000, 16000) if options.device == "cuda" else (1000,):
        with guarded(report, f"copies of {context}"):
            report["copies"] += host_copies(model, context=context, device=options.device)
            print(json.dumps(report["copies"][-2:]), file=sys.stderr, flush=True)
    for name, size in (("off", 0), ("on", options.prefix_cache_bytes)):
        settings = EngineSettings(
            device=options.device, cache_bytes=cache, prefix_cache_bytes=size, swap_bytes=0
        )
        with (
            guarded(report, name),
            Engine(model, number_tokenizer(model.config.vocab_size), settings) as engine,
        ):
            converse(engine, **case)  # kernels compile and are tuned
            report[name] = converse(engine, **case)
            if name == "off":
                floors = [
                    seconds_to_first(engine, list(random_prompt(engine, case["question"])), 1)[0]
                    for _ in range(5)
                ]
                report["floor"] = sorted(floors)[2]
            print(name, json.dumps(report[name]), file=sys.stderr, flush=True)
        free()
        if options.beside:
            with (
                guarded(report, f"beside, {name}"),
                Engine(model, number_tokenizer(model.config.vocab_size), settings) as engine,
            ):
                report["beside"][name] = between_tokens(
                    engine, beside=options.beside, prompt=256, requests=100 if options.device == "cuda" else 8
                )
                print(f"beside, {name}: {report['beside'][name]}", file=sys.stderr, flush=True)
        free()
    show(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
