"""How fast and how exact is the RWKV-7 recurrence on a GPU, beside fla, attention and the bytes it must move?

    python benchmarks/bench_wkv7.py --peers DIR_OF_fla DIR_OF_einops   # about 150 s, most of it compiling fla
    python benchmarks/bench_wkv7.py --quick --skip-errors              # about 20 s where fla is not found

Inputs are bf16 for every form, log_decay too, so that all compute the same function of the same bytes. First
errors against the definition in fp64, then times, for head sizes whose errors are within BOUNDS: medians of
triton.testing.do_bench, each run with a cold cache.

- floor: bytes / copy rate, with 7 tensors of B*T*H*K * 2 bytes forward (6 in, 1 out) and 20 forward and
  backward (6 and do in, 6 out). The copy rate is measured here and counts reads and writes.
- TFLOP/s: the chunked form's B*T*H * (8*C*(K+V) + 8*K*V) operations at C = 32 forward, three times that with
  the backward, whatever a kernel really does: a unit to compare with, not a utilisation.
- first: seconds of the first forward and backward, with compiling and autotuning.
- peak: memory of a forward and backward beyond its inputs.

Ours runs before any peer, so no fault of a peer can reach it. The last line is JSON.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fla_tuning import VARIANTS, compile_ahead, limit, load
from timing import median_ms
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from hrwkv.kernels.rates import copy_rate
from hrwkv.kernels.wkv7 import naive, wkv7

OURS = "hrwkv"
NAMES = ("dr", "dlog_decay", "dk", "dv", "da", "db", "dstate")
MAX_LOG_DECAY = math.exp(-0.5)
# Norm of the error by norm of the exact tensor. bf16 operands have 8 bits and a chunk chains four products of
# them; in fp32 the matrix units may round to tf32's 11 bits.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 2e-3}
CASES = ("uniform", "fast decay", "slow decay", "repeated keys")
# r, log_decay, k, v, a, b [B, T, H, K] and the state [B, H, K, K] or None -> o, final state
Form = Callable[..., tuple[Tensor, Tensor]]


def ours(
    *inputs: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Call the public entry on packed tokens."""
    packed = [x.flatten(0, 1) for x in inputs]
    o, state = wkv7(*packed, cu_seqlens=cu_seqlens, lengths=lengths, initial_state=initial_state)
    return o.view(inputs[3].shape), state


def form_of(name: str, *, batch: int, tokens: int, device: str) -> Form:
    """Ours or a variant of fla, for one shape."""
    if name != OURS:
        return load(name)
    cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens
    return functools.partial(ours, cu_seqlens=cu_seqlens, lengths=(tokens,) * batch)


def exact(*inputs: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp64, all sequences of a batch at once."""
    state, outputs = initial_state, []
    for r, log_decay, k, v, a, b in zip(*(x.unbind(1) for x in inputs), strict=True):
        state, o = naive.step(state, r, log_decay=log_decay, k=k, v=v, a=a, b=b)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def make_inputs(cases: Sequence[str], *, tokens: int, heads: int, key_size: int, device: str) -> list[Tensor]:
    """Fresh random r, log_decay, k, v, a, b ``[B, T, H, K]`` with values of bf16, one case a sequence."""
    rows: list[list[Tensor]] = []
    for case in cases:
        r, k, v, key = (torch.randn(tokens, heads, key_size, device=device) for _ in range(4))
        share, iclr = torch.rand_like(r), torch.rand_like(r)
        if case == "fast decay":
            share = 1 - 0.01 * share
        elif case == "slow decay":
            share = 0.001 * share
        elif case == "repeated keys":
            key, iclr = key[:1] + 0.01 * key, torch.full_like(r, 0.9)
        direction = normalize(key, dim=-1)
        rows.append([r, -MAX_LOG_DECAY * share, k * (0.5 + iclr), v, -direction, direction * iclr])
    return [torch.stack(column).bfloat16() for column in zip(*rows, strict=True)]


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies that gradients stop at, in one dtype."""
    return [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]


def all_tensors(
    form: Form, inputs: Sequence[Tensor], state: Tensor | None, grads: Sequence[Tensor]
) -> list[Tensor]:
    """o, final state and every gradient of one forward and backward."""
    o, final_state = form(*inputs, initial_state=state)
    outputs = (o, final_state) if len(grads) == 2 else (o,)
    wanted = [*inputs] if state is None else [*inputs, state]
    return [
        o,
        final_state,
        *torch.autograd.grad(outputs, wanted, [g.to(x) for g, x in zip(grads, outputs, strict=True)]),
    ]


def errors(
    names: Sequence[str], dtype: torch.dtype, *, tokens: int, heads: int, key_size: int, device: str
) -> Iterator[dict[str, Any]]:
    """Relative errors of each form and tensor against fp64, the worst of all cases."""
    sizes = {"tokens": tokens, "heads": heads, "key_size": key_size}
    inputs = make_inputs(CASES, **sizes, device=device)
    state = torch.randn(len(CASES), heads, key_size, key_size, device=device)
    grads = torch.randn_like(inputs[3].float()), torch.randn_like(state)
    double = torch.float64
    expected = all_tensors(exact, leaves(inputs, double), state.double().requires_grad_(), grads)
    for name in names:
        row: dict[str, Any] = {"form": name, "dtype": str(dtype).removeprefix("torch."), **sizes}
        try:
            form = form_of(name, batch=len(CASES), tokens=tokens, device=device)
            got = all_tensors(form, leaves(inputs, dtype), state.clone().requires_grad_(), grads)
        # A peer may fail in any way; it is told and the others go on.
        except Exception as error:
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        worst = 0.0
        for tensor, x, y in zip(("o", "state", *NAMES), got, expected, strict=True):
            difference = (x.double() - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
            # NaN compares with nothing and must not pass.
            each = [math.inf if math.isnan(error) else error for error in difference.tolist()]
            row[tensor] = max(each)
            if max(each) >= worst:
                worst, row["worst"] = max(each), f"{tensor}, {CASES[each.index(max(each))]}"
        yield row | {"max": worst, "within": worst <= BOUNDS[dtype]}


def repeats(*, key_size: int, device: str, runs: int = 20) -> bool:
    """Whether the same inputs give the same bits every time."""
    inputs = make_inputs(CASES, tokens=1000, heads=8, key_size=key_size, device=device)
    form = form_of(OURS, batch=len(CASES), tokens=1000, device=device)
    grads = [
        torch.randn_like(inputs[3].float()),
        torch.randn(len(CASES), 8, key_size, key_size, device=device),
    ]
    first: list[Tensor] = []
    for _ in range(runs):
        got = all_tensors(
            form, leaves(inputs, torch.bfloat16), torch.zeros_like(grads[1]).requires_grad_(), grads
        )
        first = first or got
        if not all(torch.equal(x, y) for x, y in zip(got, first, strict=True)):
            return False
    return True


def attention_ms(batch: int, tokens: int, heads: int, key_size: int) -> float | str:
    """Causal attention of torch in bf16, forward only."""
    q, k, v = (
        torch.randn(batch, heads, tokens, key_size, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    try:
        return median_ms(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
    except RuntimeError as error:
        return str(error)[:200]


def time_form(name: str, shape: tuple[int, int, int, int], *, rate: float) -> dict[str, Any]:
    """Times and memory of one form at one shape."""
    batch, tokens, heads, key_size = shape
    row: dict[str, Any] = {"form": name, "B": batch, "T": tokens, "H": heads, "K": key_size}
    try:
        inputs = leaves(
            make_inputs(CASES[:1] * batch, tokens=tokens, heads=heads, key_size=key_size, device="cuda"),
            torch.bfloat16,
        )
        form = form_of(name, batch=batch, tokens=tokens, device="cuda")
        grad = torch.randn_like(inputs[3])

        def forward() -> None:
            with torch.no_grad():
                form(*inputs, initial_state=None)

        def both() -> None:
            torch.autograd.grad(form(*inputs, initial_state=None)[0], inputs, grad)

        start = time.perf_counter()
        both()
        forward()
        torch.cuda.synchronize()
        row["first_s"] = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        elements = batch * tokens * heads * key_size
        flops = batch * tokens * heads * (8 * 32 * 2 * key_size + 8 * key_size * key_size)
        for part, function, tensors, share in (("fwd", forward, 7, 1), ("both", both, 20, 3)):
            row[f"{part}_ms"] = median_ms(function)
            row[f"{part}_floor_ms"] = tensors * elements * 2 / rate * 1e3
            row[f"{part}_to_floor"] = row[f"{part}_ms"] / row[f"{part}_floor_ms"]
            row[f"{part}_tflops"] = share * flops / row[f"{part}_ms"] * 1e-9
    # Out of memory, a compiler's refusal, a fault: told, and the next form is tried.
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    torch.cuda.empty_cache()
    return row


def show(title: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; what a failed row has instead of numbers comes last."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print("| " + " | ".join(texts) + " |" + f" {row.get('failed', '')}", flush=True)


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row of ours fla's time by its own, for fla's default and for its fastest that ran."""
    for row in rows:
        same = [x for x in rows if all(x[size] == row[size] for size in "BTHK") and x["form"] in VARIANTS]
        for part in ("fwd", "both"):
            times = {x["form"]: x[f"{part}_ms"] for x in same if f"{part}_ms" in x}
            if row["form"] == OURS and f"{part}_ms" in row and times:
                row[f"{part}_fla_best"] = min(times, key=times.__getitem__)
                row[f"{part}_ratio_best"] = min(times.values()) / row[f"{part}_ms"]
                if "fla" in times:
                    row[f"{part}_ratio"] = times["fla"] / row[f"{part}_ms"]


def check(form: str, key_size: int, *, lengths: Sequence[int], heads: int) -> Iterator[dict[str, Any]]:
    """Errors in bf16, and of ours in fp32 where the definition is quick.

    One more length has all the heads of the timed shape: for fla a number of heads is a kernel to compile.
    """
    for tokens, some_heads in [*((length, 2) for length in lengths), (256, heads)]:
        sizes = {"tokens": tokens, "heads": some_heads, "key_size": key_size, "device": "cuda"}
        yield from errors([form], torch.bfloat16, **sizes)
        if form == OURS and tokens <= 100:
            yield from errors([form], torch.float32, **sizes)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x4096x64", "1x32768x64"], help="BxTxH")
    parser.add_argument("--key-sizes", nargs="+", type=int, default=[64, 96])
    parser.add_argument(
        "--all", action="store_true", help="head sizes 32, 64, 96, 128 and every variant of fla"
    )
    parser.add_argument("--quick", action="store_true", help="first shape, last head size, few lengths")
    parser.add_argument("--skip-errors", action="store_true", help="time without having checked")
    parser.add_argument("--peers", nargs="*", default=[], help="directories to import fla from")
    parser.add_argument("--variants", nargs="*", default=["fla", "fla safe 64"], choices=VARIANTS)
    parser.add_argument("--fla-configs", type=int, default=8, help="configurations a kernel of fla may try")
    parser.add_argument("--fla-seconds", type=float, default=200, help="no further variant after these")
    options = parser.parse_args()
    options.lengths = [15, 100] if options.quick else [1, 15, 16, 63, 100, 4096]
    if options.all:
        options.key_sizes, options.variants = [32, 64, 96, 128], [*VARIANTS]
    if options.quick:
        options.shapes, options.key_sizes = options.shapes[:1], options.key_sizes[-1:]
    return options


def run_ours(options: argparse.Namespace, report: dict[str, Any]) -> list[int]:
    """Check and time ours; gives the head sizes that may be timed."""
    timed = []
    for key_size in options.key_sizes:
        checked = check(OURS, key_size, lengths=options.lengths, heads=options.parsed[0][2])
        rows = [] if options.skip_errors else list(checked)
        report["errors"] += rows
        if all(row.get("within", False) for row in rows):
            timed.append(key_size)
            report["repeats"][key_size] = repeats(key_size=key_size, device="cuda")
        else:
            print(
                f"K = {key_size}: REFUSED to time, errors beyond {max(BOUNDS.values())} or a failure",
                flush=True,
            )
    for shape, key_size in [(shape, key_size) for shape in options.parsed for key_size in timed]:
        report["times"].append(time_form(OURS, (*shape, key_size), rate=report["copy_rate"]))
        report["times"].append({"form": "attention", **dict(zip("BTHK", (*shape, key_size), strict=True))})
        result = attention_ms(*shape, key_size)
        report["times"][-1]["failed" if isinstance(result, str) else "fwd_ms"] = result
    return timed


def run_fla(options: argparse.Namespace, report: dict[str, Any], key_sizes: Sequence[int]) -> None:
    """Check and time fla's variants until the time is up."""
    start = time.perf_counter()
    try:
        load("fla")
    except ImportError as error:
        report["fla"] = f"not importable: {error}"
        print(f"fla is {report['fla']}", flush=True)
        return
    limit(options.fla_configs)
    report["fla"] = compile_ahead(
        options.variants,
        key_sizes,
        heads=options.parsed[0][2],
        configs=options.fla_configs,
        workers=os.cpu_count() or 1,
        peers=options.peers,
    )
    print(f"fla compiled ahead: {report['fla']}", flush=True)
    for variant in options.variants:
        if time.perf_counter() - start > options.fla_seconds:
            report["times"].append({"form": variant, **dict.fromkeys("BTHK"), "failed": "no time left"})
            continue
        for shape, key_size in [(shape, key_size) for shape in options.parsed for key_size in key_sizes]:
            report["times"].append(time_form(variant, (*shape, key_size), rate=report["copy_rate"]))
        for key_size in () if options.skip_errors else key_sizes:
            lengths = options.lengths if options.all else ()
            report["errors"] += check(variant, key_size, lengths=lengths, heads=options.parsed[0][2])


def main() -> None:
    """Measure, print the tables and the JSON."""
    options = parse()
    sys.path[:0] = options.peers
    options.parsed = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    start = time.perf_counter()
    rate = statistics.median(copy_rate() for _ in range(3))
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "copy_rate": rate}
    report |= {"errors": [], "times": [], "repeats": {}}
    print(f"{device}, torch {torch.__version__}, copy rate {rate * 1e-12:.2f} TB/s", flush=True)
    timed = run_ours(options, report)
    print(f"ours done after {time.perf_counter() - start:.0f} s", flush=True)
    if timed:
        run_fla(options, report, timed)
    add_ratios(report["times"])
    sizes = ("form", "dtype", "key_size", "heads", "tokens")
    show(
        "Relative errors against fp64, worst of the cases",
        (*sizes, "o", "state", *NAMES, "worst", "within"),
        report["errors"],
    )
    shape = ("form", "B", "T", "H", "K")
    parts = [
        f"{part}_{x}" for part in ("fwd", "both") for x in ("ms", "ratio", "ratio_best", "to_floor", "tflops")
    ]
    show("Times; ratio: fla's time by ours", (*shape, *parts, "peak_gib", "first_s"), report["times"])
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\nsame bits in 20 runs, by head size: {report['repeats']}; {report['seconds']} s in all")
    print(json.dumps(report))
    sys.exit(0 if timed == options.key_sizes else 1)


if __name__ == "__main__":
    main()
