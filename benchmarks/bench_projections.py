"""What do a decode step's projections cost on a GPU: one by one, the input multiplied once, in two launches?

    python benchmarks/bench_projections.py                     # about a minute, 2.5 GB
    python benchmarks/bench_projections.py --tokens 1 --layers 2
    python benchmarks/bench_projections.py --device cpu --size 64 --layers 1   # proves the script, no figures

Modules have Reka-Flash-3's shape in bf16 with ranks by the released formula (hxa079); each launch is inside a
CUDA graph over ``--layers`` of them, so that their weights exceed the cache. mixer: r, k, v and the low-rank
products, up to the decode kernel; attention: q, k, v; mlp: SwiGLU whole. Forms: apart, fused (the input meets
one matrix), and for the mixer launch (the second factors and their activations in one kernel besides).

ratio is the time by that of apart, floor the time to copy the weights' bytes once. Errors come first: no form
is timed that differs from apart in fp32 by more than BOUND. The last line is JSON.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from bench_decode import attempt, graph_ms
from timing import facts, median_ms, report
from torch import Tensor, nn

from hrwkv.kernels.low_rank import expand, naive
from hrwkv.layers import time_mix
from hrwkv.layers.attention import Attention
from hrwkv.layers.common import SwiGLU
from hrwkv.layers.projections import Projections
from hrwkv.layers.time_mix import LowRankSizes, TimeMix

# Norm of the error by norm of the exact tensor: activations and results are rounded to bf16, 2e-3 each.
BOUND = 6e-3
RANKS = LowRankSizes(decay=320, iclr=128, value=96, key=96, gate=384)
COLUMNS = ("module", "tokens", "form", "ms", "ratio", "floor_ms", "of floor")
FORMS = {"mixer": ("apart", "fused", "launch"), "attention": ("apart", "fused"), "mlp": ("apart", "fused")}
Row = dict[str, object]


def make(kind: str, *, size: int, device: str) -> Projections:
    """A module with random weights whose products are of order 1; size: the model's width."""
    heads = {"num_kv_heads": max(size // 768, 1), "head_dim": 96 if size % 96 == 0 else 32}
    num_heads = size // heads["head_dim"]
    with torch.device(device):
        module: Projections
        if kind == "mixer":
            module = TimeMix(size, num_heads, ranks=RANKS, **heads)
        elif kind == "attention":
            module = Attention(size, num_heads, **heads)
        else:
            module = SwiGLU(size, 19648 * size // 6144)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=size**-0.5)
    return module.bfloat16()


def run(kind: str, form: str, module: Projections, x: Tensor) -> tuple[Tensor, ...]:
    """The products of x; with ``launch`` as an engine computes them."""
    if isinstance(module, TimeMix):
        with patch.object(time_mix, "expand", expand if form == "launch" else naive.expand):
            rows = module._project(x, in_first=False)
        return tuple(part for part in rows if part is not None)
    if kind == "attention":
        product = module.projected(x)
        return tuple(product(name) for name in module.projections)
    return (module(x),)


def weight_bytes(kind: str, module: Projections) -> int:
    """Of what ``run`` reads."""
    skipped = {"mixer": ("output.", "w0", "a0", "v0", "k0", "r_k"), "attention": ("o_proj.",), "mlp": ()}[
        kind
    ]
    return sum(p.nbytes for name, p in module.named_parameters() if not name.startswith(skipped))


def check(kind: str, form: str, modules: list[Projections], x: Tensor) -> float:
    """The largest error of a form against the same weights in fp32, one by one."""
    exact = make(kind, size=x.shape[1], device=str(x.device)).float()
    exact.load_state_dict(modules[0].state_dict())
    pairs = zip(run(kind, form, modules[0], x), run(kind, "apart", exact, x.float()), strict=True)
    return max(((y.float() - z).norm() / z.norm()).item() for y, z in pairs)


def measure(kind: str, options: argparse.Namespace, *, rate: float, failures: list[str]) -> Iterator[Row]:
    """A row for each number of tokens and form."""
    modules = [make(kind, size=options.size, device=options.device) for _ in range(options.layers)]
    floor = 1e3 * weight_bytes(kind, modules[0]) / rate
    apart: dict[int, float | None] = {}
    for form in FORMS[kind]:
        if form == "fused":
            for module in modules:
                module.fuse_projections()
        for tokens in options.tokens:
            x = torch.randn(tokens, options.size, device=options.device, dtype=torch.bfloat16)
            calls: list[Callable[[], object]] = [functools.partial(run, kind, form, m, x) for m in modules]
            case = f"{kind} {tokens} {form}"
            error = attempt(case, functools.partial(check, kind, form, modules, x), failures)
            if error is None or not error <= BOUND:
                failures.append(f"{case}: wrong by {error}, allowed {BOUND}")
                continue
            spend = functools.partial(graph_ms, calls, rounds=-(-38 // len(calls)))
            if options.device == "cpu":
                spend = functools.partial(median_ms, calls[0], device="cpu")
            spent = attempt(case, spend, failures)
            apart.setdefault(tokens, spent)
            first = apart[tokens]
            row: Row = {"module": kind, "tokens": tokens, "form": form, "ms": spent, "floor_ms": floor}
            ratio = spent and first and spent / first
            yield row | {"ratio": ratio, "of floor": spent and floor / spent, "error": error}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 512])
    parser.add_argument("--layers", type=int, default=4, help="modules that a graph walks")
    parser.add_argument("--size", type=int, default=6144, help="the model's width")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Check, measure, print the table and the JSON."""
    options, start = parse(), time.perf_counter()
    torch.manual_seed(0)
    about = facts(options.device)
    print(about)
    rate, failures = float(about["copy_tb_s"]) * 1e12, list[str]()
    found = (measure(kind, options, rate=rate, failures=failures) for kind in FORMS)
    report(itertools.chain.from_iterable(found), COLUMNS, about=about, failures=failures, start=start)


if __name__ == "__main__":
    main()
