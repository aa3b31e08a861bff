"""Products with frozen 8-bit weights and the work around them, part by part, at one MLP's shape.

    python benchmarks/bench_matmul.py
    python benchmarks/bench_matmul.py --tokens 4096 --width 4096 --inner 12288

Floors: a product's operations at the chip's stated rate (8-bit twice the bf16 one), a kernel's bytes at the
rate of a copy; a whole MLP's are its products in 8 bits. The ratio is to the same work with bf16 weights, by
torch. Under a minute on an H200. A part that fails says so. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import copy_rate, median_ms
from torch import Tensor

from hrwkv.kernels.matmul import (
    FrozenWeight,
    dequantise,
    frozen_swiglu,
    fused,
    quantise,
    rounds_inputs,
)
from hrwkv.kernels.norm import naive as naive_norm
from hrwkv.kernels.norm import rms_norm
from hrwkv.model.flops import PEAK_BF16

COLUMNS = ("ms", "bf16_ms", "ratio", "floor_ms", "x_floor", "error")
Parts = dict[str, tuple[Callable[[], object], Callable[[], object] | None, float]]


def scaled(x: Tensor, scale: Tensor, weight: FrozenWeight, *, fast: bool) -> Tensor:
    """Torch's product with a scale a row, with both ways of summing."""
    scales = {"scale_a": scale.unsqueeze(-1), "scale_b": weight.scales.unsqueeze(0)}
    return torch._scaled_mm(x, weight.values.T, out_dtype=torch.bfloat16, use_fast_accum=fast, **scales)


def with_gradient(form: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x through ``form``."""
    return torch.autograd.grad(form(x), x, grad)[0]


def parts(options: argparse.Namespace, copy: float) -> tuple[Parts, dict[str, Callable[[], float]]]:
    """Each part: ours, the same in bf16 by torch, its floor in ms; and relative errors of some."""
    tokens, width, inner = options.tokens, options.width, options.inner
    weights = [
        quantise(torch.randn(shape, device="cuda") * shape[1] ** -0.5, torch.float8_e4m3fn)
        for shape in [(inner, width), (inner, width), (width, inner)]
    ]
    dense = [dequantise(weight, torch.bfloat16) for weight in weights]
    x, grad = torch.randn(2, tokens, width, device="cuda", dtype=torch.bfloat16)
    g, u, inner_grad = torch.randn(3, tokens, inner, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    values, scale = fused.quantise_rows(x.detach())
    norm = torch.ones(width, device="cuda", requires_grad=True)

    def torch_mlp(x: Tensor) -> Tensor:
        return (F.silu(x @ dense[0].T) * (x @ dense[1].T)) @ dense[2].T

    def mlp(x: Tensor, recompute: bool = False) -> Tensor:
        return frozen_swiglu(x, *weights, recompute=recompute)

    bf16_product = functools.partial(torch.mm, x.detach(), dense[0].T)
    product = 2e3 * tokens * width * inner / (2 * PEAK_BF16["H200"])
    element = 1e3 / copy
    columns = {"gate_columns": weights[0].scales, "up_columns": weights[1].scales}
    own = functools.partial(scaled, values, scale, weights[0])
    gradient_rows = functools.partial(fused.swiglu_gradient_rows, inner_grad, g, u, **columns)
    table: Parts = {
        "x W, fast sums": (lambda: own(fast=True), bf16_product, product),
        "x W, exact sums": (lambda: own(fast=False), bf16_product, product),
        "transpose W": (lambda: fused.transpose(weights[0].values), None, 2 * width * inner * element),
        "rows of x": (lambda: fused.quantise_rows(x.detach()), None, 3 * tokens * width * element),
        "rows of SwiGLU": (
            lambda: fused.swiglu_rows(g, u), lambda: F.silu(g) * u, 5 * tokens * inner * element
        ),
        "rows of its gradients": (gradient_rows, None, 8 * tokens * inner * element),
        "MLP forward": (lambda: mlp(x.detach()), lambda: torch_mlp(x.detach()), 3 * product),
        "MLP with gradient": (
            lambda: with_gradient(mlp, x, grad), lambda: with_gradient(torch_mlp, x, grad), 6 * product
        ),
        "MLP with gradient, recomputed": (
            lambda: with_gradient(lambda x: mlp(x, True), x, grad),
            lambda: with_gradient(torch_mlp, x, grad),
            8 * product,
        ),
        "RMSNorm": (
            lambda: rms_norm(x.detach(), norm, eps=1e-6),
            lambda: naive_norm.rms_norm(x.detach(), norm, eps=1e-6),
            4 * tokens * width * element,
        ),
        "RMSNorm with gradients": (
            lambda: torch.autograd.grad(rms_norm(x, norm, eps=1e-6), (x, norm), grad),
            lambda: torch.autograd.grad(naive_norm.rms_norm(x, norm, eps=1e-6), (x, norm), grad),
            10 * tokens * width * element,
        ),
    }  # fmt: skip

    def error(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
        found, expected = ours().float(), theirs().float()
        return ((found - expected).norm() / expected.norm()).item()

    names = ["x W, fast sums", "x W, exact sums", "MLP forward", "MLP with gradient", "RMSNorm"]
    return table, {name: functools.partial(error, *table[name][:2]) for name in names}  # type: ignore[arg-type]


def attempt(row: dict[str, Any], measure: Callable[[], dict[str, float]]) -> None:
    """Add what is measured; a failure is told and stops nothing else."""
    try:
        row |= measure()
    except Exception as error:  # out of memory, or a size that torch's kernel refuses
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    torch.cuda.empty_cache()


def times(ours: Callable[[], object], theirs: Callable[[], object] | None, floor: float) -> dict[str, float]:
    """Milliseconds of a part and of its counterpart."""
    row = {"ms": median_ms(ours), "floor_ms": floor}
    row["x_floor"] = row["ms"] / floor
    if theirs is not None:
        row["bf16_ms"] = median_ms(theirs)
        row["ratio"] = row["bf16_ms"] / row["ms"]
    return row


def main() -> None:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--inner", type=int, default=19648)
    options = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    copy = copy_rate()
    table, errors = parts(options, copy)
    rounds = rounds_inputs(quantise(torch.ones(16, 16, device="cuda"), torch.float8_e4m3fn))
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": {}}
    report |= {"in_8_bits": rounds, "copy_tb_per_s": copy * 1e-12, **vars(options)}
    for name, part in table.items():
        row = report["rows"].setdefault(name, {})
        attempt(row, functools.partial(times, *part))
        if name in errors:
            attempt(row, lambda name=name: {"error": errors[name]()})
    report["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{report['device']}, torch {report['torch']}, copy {copy * 1e-12:.2f} TB/s, in 8 bits: {rounds}\n")
    print("| part | " + " | ".join(COLUMNS) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    for name, row in report["rows"].items():
        cells = [f"{row.get(column, math.nan):.3g}".replace("nan", "") for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + f" | {row.get('failed', '')}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
