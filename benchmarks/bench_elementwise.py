"""What does the work by elements around a layer's products cost on a GPU, beside the bytes that it must move?

    python benchmarks/bench_elementwise.py                     # about a minute, 4 GB
    python benchmarks/bench_elementwise.py --tokens 256 --train-tokens 0
    python benchmarks/bench_elementwise.py --device cpu --size 64 --tokens 3 --train-tokens 5   # no figures

bf16, of Reka-Flash-3's shape. swiglu: silu(gate) * up of two views of one product, as an engine has them;
norm: the residual's sum and the norm of it. torch is what they replace: two operations for the gate, the sum
and then the norm's own kernel. Few tokens are measured inside a CUDA graph that walks over enough tensors to
exceed the cache (``--pool-mb``; a step's own are in it, so these times are upper bounds), ``--train-tokens``
by do_bench, with their backward passes; torch's gate there is autograd's.

ratio is torch's time by ours; floor the bytes read and written once at the measured copy rate. Errors come
first: no form is timed that differs from fp64 by more than BOUND. The last line is JSON.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_decode import attempt, graph_ms
from timing import facts, median_ms, report
from torch import Tensor

from hrwkv.kernels.norm import add_rms_norm, rms_norm
from hrwkv.kernels.swiglu import swiglu

# Norm of the error by norm of the exact tensor: two roundings to bf16, 2e-3 each.
BOUND = 6e-3
INNER = 19648 / 6144  # of the MLP, by the model's width
COLUMNS = ("what", "tokens", "pass", "torch_ms", "ours_ms", "ratio", "floor_ms", "of floor")
Row = dict[str, object]
Form = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    """Two forms of one function of some tensors; bytes: that a forward and a backward pass must move."""

    torch: Form
    ours: Form
    inputs: list[Tensor]
    bytes: dict[str, int]


def swiglu_case(tokens: int, size: int, device: str) -> Case:
    """Gate and up as views of one product."""
    width = int(size * INNER)
    product = torch.randn(tokens, 2 * width, device=device, dtype=torch.bfloat16)
    part = product.nbytes // 2
    return Case(
        lambda gate, up: (F.silu(gate) * up,),
        lambda gate, up: (swiglu(gate, up),),
        list(product.split(width, dim=-1)),
        {"forward": 3 * part, "backward": 5 * part},
    )


def norm_case(tokens: int, size: int, device: str) -> Case:
    """The residual stream and what is added to it."""
    x, delta = torch.randn(2, tokens, size, device=device, dtype=torch.bfloat16)
    weight = torch.rand(size, device=device)

    def apart(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, rms_norm(total, weight.to(x.dtype), eps=1e-6)

    def together(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, delta, weight=weight.to(x.dtype), eps=1e-6)

    moved = 4 * x.nbytes
    return Case(apart, together, [x, delta, weight], {"forward": moved, "backward": moved})


MAKE = {"swiglu": swiglu_case, "norm": norm_case}


def results(form: Form, inputs: list[Tensor], *, backward: bool) -> list[Tensor]:
    """What a form returns, with the gradients of its inputs for a gradient of ones times a slope."""
    if not backward:
        with torch.no_grad():
            return list(form(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = form(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [0.5 + y.detach() for y in outputs])]


def check(case: Case, *, backward: bool) -> float:
    """The larger error of both forms against the same in fp64."""
    wide = [x.cpu().double() for x in case.inputs]
    exact = results(case.torch, wide, backward=backward)
    return max(
        ((y.cpu().double() - z).norm() / z.norm()).item()
        for form in (case.torch, case.ours)
        for y, z in zip(results(form, case.inputs, backward=backward), exact, strict=True)
    )


def spend(form: Form, cases: list[Case], *, backward: bool, device: str) -> float:
    """Milliseconds of a call without gradients in a CUDA graph, or, with ``backward``, of that pass alone."""
    if not backward:
        calls: list[Callable[[], object]] = [functools.partial(form, *case.inputs) for case in cases]
        if device == "cpu":
            return median_ms(calls[0], device="cpu")
        with torch.inference_mode():
            return graph_ms(calls, rounds=-(-60 // len(calls)))
    leaves = [x.detach().requires_grad_() for x in cases[0].inputs]
    outputs = form(*leaves)
    grads = [torch.ones_like(y) for y in outputs]
    return median_ms(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True), device=device)


def measure(what: str, options: argparse.Namespace, *, rate: float, failures: list[str]) -> Iterator[Row]:
    """A row for each number of tokens and pass."""
    plan = [(tokens, "forward") for tokens in options.tokens]
    plan += [(options.train_tokens, name) for name in ("forward", "backward") if options.train_tokens]
    for tokens, name in plan:
        backward = name == "backward"
        label = f"{what} {tokens} {name}"
        small = MAKE[what](min(tokens, 256), options.size, options.device)
        error = attempt(label, functools.partial(check, small, backward=backward), failures)
        if error is None or not error <= BOUND:
            failures.append(f"{label}: wrong by {error}, allowed {BOUND}")
            continue
        case = MAKE[what](tokens, options.size, options.device)
        count = 1 if backward else -(-options.pool_mb * 2**20 // sum(x.nbytes for x in case.inputs))
        cases = [case, *(MAKE[what](tokens, options.size, options.device) for _ in range(min(count, 64) - 1))]
        theirs, ours = (
            attempt(
                label,
                functools.partial(spend, form, cases, backward=backward, device=options.device),
                failures,
            )
            for form in (case.torch, case.ours)
        )
        floor = 1e3 * case.bytes[name] / rate
        row: Row = {"what": what, "tokens": tokens, "pass": name, "torch_ms": theirs, "ours_ms": ours}
        yield row | {
            "ratio": ours and theirs and theirs / ours,
            "floor_ms": floor,
            "of floor": ours and floor / ours,
            "error": error,
        }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 512])
    parser.add_argument("--train-tokens", type=int, default=8192, help="of a training step; 0: none")
    parser.add_argument("--size", type=int, default=6144, help="the model's width")
    parser.add_argument("--pool-mb", type=int, default=200, help="tensors that a graph walks")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


def main() -> None:
    """Check, measure, print the table and the JSON."""
    options, start = parse(), time.perf_counter()
    torch.manual_seed(0)
    about = facts(options.device)
    print(about)
    rate, failures = float(about["copy_tb_s"]) * 1e12, list[str]()
    found = (measure(what, options, rate=rate, failures=failures) for what in MAKE)
    report(itertools.chain.from_iterable(found), COLUMNS, about=about, failures=failures, start=start)


if __name__ == "__main__":
    main()
