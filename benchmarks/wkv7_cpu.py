"""How much faster is the chunked recurrence than its definition, and how near to its matrix products?

    python benchmarks/wkv7_cpu.py                                     # the default shapes, one thread
    python benchmarks/wkv7_cpu.py --shape 4x512x4x32 --chunk 16 32 --threads 2

A shape is sequences x tokens x heads x key size. Times are forward plus backward in fp32; each is the best of
its runs, because a machine that does something else as well can only add to them. ``naive`` is the loop over
tokens with autograd, timed on ``--naive-tokens`` tokens of each sequence and scaled to all (it is linear in
them). ``floor`` is the time that the chunked form's matrix products would take at the rate of one large
product. The last line is JSON.
"""

import argparse
import functools
import json
import math
import platform
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hrwkv.kernels.wkv7 import chunk_torch, naive


def make_inputs(lengths: Sequence[int], *, heads: int, key_size: int) -> list[Tensor]:
    """Random r, log_decay, k, v, a, b ``[T, H, K]`` as a mixer makes them, with gradients."""
    r, k, v, key = torch.randn(4, sum(lengths), heads, key_size).unbind()
    direction = normalize(key, dim=-1)
    log_decay = -math.exp(-0.5) * torch.rand_like(r)
    inputs = (r, log_decay, k, v, -direction, direction * torch.rand_like(r))
    return [x.detach().requires_grad_() for x in inputs]


def step(
    form: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], lengths: Sequence[int]
) -> None:
    """Run forward and backward once."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    o, _ = form(*inputs, cu_seqlens=cu_seqlens, lengths=lengths)
    torch.autograd.grad(o, inputs, torch.ones_like(o))


def best_seconds(functions: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Give the best time of each function, taken in turns so that a disturbance meets all of them."""
    best = dict.fromkeys(functions, math.inf)
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def matmul_flops(*, chunk: int, key_size: int) -> int:
    """Operations of the products for one chunk and head, forward and backward, with K = V."""
    square, state, walk = chunk * chunk * key_size, chunk * key_size * key_size, 2 * key_size**3
    prepare = 10 * square
    forward = prepare + 10 * square + 8 * state + walk
    backward = prepare + 44 * square + 18 * state + walk
    return forward + backward


def matmul_rate() -> float:
    """Operations a second of one 1024 x 1024 product."""
    x = torch.randn(1024, 1024)
    return 2 * 1024**3 / best_seconds({"": functools.partial(torch.mm, x, x)}, repeats=10)[""]


def measure(
    shape: str, *, chunks: Sequence[int], repeats: int, naive_tokens: int
) -> list[dict[str, float | str]]:
    """Time one shape, once per chunk size."""
    num, tokens, heads, key_size = map(int, shape.split("x"))
    lengths, short = (tokens,) * num, (min(tokens, naive_tokens),) * num
    inputs = make_inputs(lengths, heads=heads, key_size=key_size)
    functions: dict[str, Callable[[], object]] = {
        str(chunk): functools.partial(step, functools.partial(chunk_torch.wkv7, chunk=chunk), inputs, lengths)
        for chunk in chunks
    }
    rate = matmul_rate()
    best = best_seconds(functions, repeats=repeats)
    few = make_inputs(short, heads=heads, key_size=key_size)
    slow = best_seconds({"naive": functools.partial(step, naive.wkv7, few, short)}, repeats=2)["naive"]
    slow *= sum(lengths) / sum(short)
    rows: list[dict[str, float | str]] = []
    for chunk in chunks:
        flops = matmul_flops(chunk=chunk, key_size=key_size) * num * heads * math.ceil(tokens / chunk)
        seconds = best[str(chunk)]
        rows.append(
            {
                "shape": shape,
                "chunk": chunk,
                "naive_ms": round(slow * 1e3, 1),
                "chunk_ms": round(seconds * 1e3, 2),
                "ratio": round(slow / seconds, 1),
                "floor_ms": round(flops / rate * 1e3, 2),
                "gflops": round(flops / seconds / 1e9, 1),
            }
        )
    return rows


def main() -> None:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", default=["4x512x4x32", "2x1024x4x32", "4x512x4x64", "2x512x4x128"]
    )
    parser.add_argument("--chunk", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--naive-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread(s), fp32, forward + backward")
    columns = ("shape", "chunk", "naive_ms", "chunk_ms", "ratio", "floor_ms", "gflops")
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    rows = []
    for shape in options.shape:
        for row in measure(
            shape, chunks=options.chunk, repeats=options.repeats, naive_tokens=options.naive_tokens
        ):
            print("| " + " | ".join(str(row[column]) for column in columns) + " |", flush=True)
            rows.append(row)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": options.threads}
    print(json.dumps({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
