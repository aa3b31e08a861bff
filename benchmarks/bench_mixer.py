"""What does one RWKV-7 mixer cost between its projections and W_o on a GPU, with these kernels and without?

    python benchmarks/bench_mixer.py                       # about 50 s, half of it compiling
    python benchmarks/bench_mixer.py --size 64 --skip-torch
    python benchmarks/bench_mixer.py --device cpu --shapes 2x40x8 --num 2      # proves the script, no figures

Rows and weights are bf16 with 8 KV heads in the released form (hxa079), log_decay and the state fp32. First
the errors of ``kernels`` against fp64; nothing is timed unless all are within BOUND. Forms, all from the same
rows to the input of W_o:

- kernels: ``mixer`` as a layer calls it; in decode ``mixer_decode``, one launch.
- torch mix: the definitions of ``mix`` and ``finish`` by torch's operators around the same ``wkv7``.
- torch: the recurrence by torch's operators too (``chunk_torch``, in decode ``naive``): no kernel of ours.

Columns: ratio is the form's time by that of kernels. floor is the time to copy what one ideal kernel has to
read and write: rows, weights, first layer and RoPE once in, y once out; the backward reads them and dy and
writes every gradient; decode reads and writes its states besides. peak is the memory of a call beyond its
inputs. Passes: forward without gradients, both with; decode in a CUDA graph of layers that exceed the cache
together, decode eager as called one by one from Python. Times are medians. The last line is JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from bench_decode import FORM, Case, Layer, attempt, double, graph_ms, make_layer, make_layers, torch_mixer
from torch import Tensor

from hrwkv.kernels import wkv7 as recurrence
from hrwkv.kernels.mix import finish, mix
from hrwkv.kernels.mix import naive as torch_mix
from hrwkv.kernels.rates import copy_rate
from hrwkv.kernels.wkv7 import chunk_torch

# Norm of the error by norm of the exact tensor. bf16 rounds by 2e-3 again and again: what the recurrence
# takes, the operands of its chunks, o, and each gradient on its way.
BOUND = 2e-2
COLUMNS = ("case", "pass", "form", "ms", "ratio", "floor_ms", "of floor", "peak_gib")
Row = dict[str, object]


def torch_wkv7(
    *inputs: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in torch's matrix products, which takes every head's own v and a."""
    repeated = [torch_mix.repeat_heads(x, inputs[0].shape[1]) for x in inputs]
    return chunk_torch.wkv7(*repeated, cu_seqlens=cu_seqlens, lengths=lengths, initial_state=initial_state)


FORMS: dict[str, tuple[Callable[..., object], ...]] = {
    "kernels": (mix, recurrence.wkv7, finish),
    "torch mix": (torch_mix.mix, recurrence.wkv7, torch_mix.finish),
    "torch": (torch_mix.mix, torch_wkv7, torch_mix.finish),
}


def run(form: str, layer: Layer) -> Tensor:
    """From rows to y over whole sequences."""
    num = len(layer.slots)
    lengths = [len(layer.rows.r) // num] * num
    mix, wkv7, finish = FORMS[form]
    mixed, bonus, _ = mix(layer.rows, layer.weights, form=FORM, rope=layer.rope, first=layer.first)
    o, _ = wkv7(*mixed, cu_seqlens=layer.cu_seqlens, lengths=lengths)
    return finish(o, mixed.v, layer.rows.gate, bonus=bonus)


def run_decode(layer: Layer) -> Tensor:
    """One token a sequence, as a layer calls it."""
    y, _ = recurrence.mixer_decode(
        layer.rows,
        layer.weights,
        form=FORM,
        rope=layer.rope,
        first=layer.first,
        state=layer.state,
        state_slots=layer.slots,
    )
    return y


def leaves(layer: Layer) -> dict[str, Tensor]:
    """What gradients are asked for, by name."""
    parts = (*layer.rows._asdict().items(), *layer.weights._asdict().items())
    named = {name: x for name, x in parts if x is not None}
    named |= dict(zip(("v_first", "k_first"), layer.first, strict=True))
    for x in named.values():
        x.requires_grad_()
    return named


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors)


def milliseconds(call: Callable[[], object], *, device: str, seconds: float = 0.3) -> float:
    """Median of up to 20 calls, or of as many as fit in the time; at least two beside a warm one."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < 21 and time.perf_counter() - start < seconds):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            before = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times[1:])


def errors(case: Case, *, device: str) -> dict[str, float]:
    """Of y and every gradient of a few tokens in ``kernels``, and of y and state of a decode step."""
    layer = make_layer(case._replace(num=3, tokens=67), device=device)
    exact_layer = double(layer)
    ours, exact = leaves(layer), leaves(exact_layer)
    y, exact_y = run("kernels", layer), run("kernels", exact_layer)  # fp64 takes the definitions
    dy = torch.randn_like(y)
    pairs = {"y": (y, exact_y)}
    grads = torch.autograd.grad(y, list(ours.values()), dy)
    exact_grads = torch.autograd.grad(exact_y, list(exact.values()), dy.double())
    pairs |= {f"d{name}": pair for name, pair in zip(ours, zip(grads, exact_grads, strict=True), strict=True)}
    step = make_layer(case._replace(num=3, tokens=1), device=device)
    exact_step = double(step)
    pairs["decode y"] = run_decode(step), torch_mixer(exact_step)
    pairs["decode state"] = step.state, exact_step.state
    with torch.no_grad():
        return {name: ((x.double() - z).norm() / z.norm()).item() for name, (x, z) in pairs.items()}


def measure(call: Callable[[], object], *, device: str) -> Row:
    """Time and peak memory of a call; the first one compiles."""
    call()
    if device != "cuda":
        return {"ms": milliseconds(call, device=device)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": milliseconds(call, device=device), "peak_gib": peak / 2**30}


def train_rows(
    case: Case, forms: Sequence[str], *, rate: float, device: str, failures: list[str]
) -> Iterator[Row]:
    """Forward, and forward with backward, of each form."""
    layer = make_layer(case, device=device)._replace(mixed=())
    inputs = leaves(layer)
    dy = torch.randn_like(layer.rows.r)
    size = nbytes(chain(inputs.values(), layer.rope))
    forward = size + nbytes([dy])
    floors = {"forward": forward, "both": forward + size + nbytes([dy]) + nbytes(inputs.values())}

    def call(form: str, part: str) -> object:
        with torch.set_grad_enabled(part == "both"):
            y = run(form, layer)
            return torch.autograd.grad(y, list(inputs.values()), dy) if part == "both" else y

    for part, moved in floors.items():
        for form in forms:
            timing = functools.partial(measure, functools.partial(call, form, part), device=device)
            found = attempt(f"{case} {part} {form}", timing, failures)
            yield {"pass": part, "form": form, "floor_ms": 1e3 * moved / rate, **(found or {})}


def decode_rows(
    case: Case, forms: Sequence[str], *, rate: float, device: str, failures: list[str]
) -> Iterator[Row]:
    """One step in a graph and eager, in one launch and by torch's operators."""
    layers = make_layers(case, pool_mb=90, device=device)
    step = layers[0]
    inputs = [x for x in (*step.rows, *step.weights, *step.first, *step.rope) if x is not None]
    moved = nbytes([*inputs, step.rows.r]) + 2 * case.state_bytes

    def eager(function: Callable[[Layer], object]) -> float:
        return milliseconds(lambda: [function(layer) for layer in layers], device=device) / len(layers)

    def graph(function: Callable[[Layer], object]) -> float:
        return graph_ms([functools.partial(function, layer) for layer in layers], rounds=1)

    timings = {"decode": graph, "decode eager": eager} if device == "cuda" else {"decode eager": eager}
    for part, timing in timings.items():
        for form, function in (("kernels", run_decode), ("torch", torch.no_grad()(torch_mixer))):
            if form in forms:
                spent = attempt(f"{case} {part} {form}", functools.partial(timing, function), failures)
                yield {"pass": part, "form": form, "ms": spent, "floor_ms": 1e3 * moved / rate}


def complete(rows: Iterable[Row], case: Case) -> Iterator[Row]:
    """Add the case, the ratio to kernels in the same pass, and the part of the floor."""
    ours: dict[object, object] = {}
    for row in rows:
        spent = row.get("ms")
        if row["form"] == "kernels":
            ours[row["pass"]] = spent
        if isinstance(spent, float):
            row["of floor"] = row["floor_ms"] / spent
            if ours.get(row["pass"]):
                row["ratio"] = spent / ours[row["pass"]]
        yield {"case": f"{case.num}x{case.tokens}, H={case.heads}, K={case.size}", **row}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x4096x64", "1x32768x64"], help="NxTxH")
    parser.add_argument("--size", type=int, default=96, help="key and value size")
    parser.add_argument("--num", type=int, nargs="*", default=[1, 64, 256], help="sequences of a decode step")
    parser.add_argument("--skip-torch", action="store_true", help="kernels alone")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


def main() -> None:
    """Check, measure, print the table and the JSON."""
    options, start = parse(), time.perf_counter()
    device = options.device
    torch.manual_seed(0)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    cases = [Case(num, tokens, heads, options.size, "fp32") for num, tokens, heads in shapes]
    heads = shapes[0][2]
    cases += [Case(num, 1, heads, options.size, "fp32") for num in options.num]
    found = errors(cases[0], device=device)
    print("errors: " + ", ".join(f"{name} {x:.1e}" for name, x in found.items()), flush=True)
    # A NaN is no smaller than anything.
    if not all(x <= BOUND for x in found.values()):
        raise SystemExit(f"an error is beyond {BOUND}: nothing is timed")
    rate = copy_rate(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"device": name, "torch": torch.__version__, "copy_tb_s": rate / 1e12}
    print(f"{facts}, ready after {time.perf_counter() - start:.0f} s")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    forms = ["kernels"] if options.skip_torch else list(FORMS)
    rows, failures = [], []

    def show(case: Case) -> None:
        timed = decode_rows if case.tokens == 1 else train_rows
        for row in complete(timed(case, forms, rate=rate, device=device, failures=failures), case):
            rows.append(row)
            cells = (row.get(column, "") for column in COLUMNS)
            texts = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
            print("| " + " | ".join(texts) + " |", flush=True)

    for case in cases:
        attempt(str(case), functools.partial(show, case), failures)
    for failure in failures:
        print("failed:", failure)
    facts |= {"seconds": round(time.perf_counter() - start, 1), "failures": failures}
    print(json.dumps({**facts, "errors": found, "rows": rows}))


if __name__ == "__main__":
    main()
