"""How near the mixer's work by elements comes to the memory's own speed: ``mix`` and ``finish`` on a GPU.

Ours is the Triton form, forward alone and forward with backward, against ``naive`` as it is and against
``torch.compile`` of it. floor_ms is the bytes that the call has to read and write, each once, over the rate
of a copy measured beside it; of_floor is floor over ours. Before it times, the script compares every output
and gradient with ``naive`` in fp64 on small cases, and stops where one is off by more than bf16's rounding.
Meant for less than 90 s a shape, most of it torch.compile's; ``--skip-compile`` leaves that out.

Example::

    PYTHONPATH=. python benchmarks/bench_mix.py --shapes 32768x64x8x96 32768x32x8x128 --skip-compile
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton
from timing import median_ms
from torch import Tensor

from hrwkv.kernels.mix import fused_finish, fused_mix, naive
from hrwkv.kernels.mix.naive import Form, Mixed, Rows, Weights
from hrwkv.kernels.rates import copy_rate

FORM = Form(value_residual="gated", key_scale="log_log", norm_eps=1e-6)
COLUMNS = (
    "shape",
    "function",
    "pass",
    "ours_ms",
    "floor_ms",
    "of_floor",
    "naive_ms",
    "naive_ratio",
    "compile_ms",
    "compile_ratio",
    "note",
)
# bf16's rounding, relative to a tensor's largest element.
ALLOWED = 5e-3
Leaves = list[Tensor]
Call = Callable[..., list[Tensor]]


def mix_inputs(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> tuple[Leaves, tuple[Tensor, ...]]:
    """Rows, vectors and first layer of an hxa079 layer as leaves; cos and sin."""
    num_tokens, heads, kv_heads, size = shape

    def random(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device)

    full = [random(num_tokens, heads, size) for _ in range(3)]
    shared = [random(num_tokens, kv_heads, size) for _ in range(6)]
    of_vectors = (heads, heads, kv_heads, kv_heads, heads)
    vectors = [random(count * size, dtype=torch.float32) for count in of_vectors]
    angle = torch.rand(num_tokens, size // 2, device=device) * 6.3
    leaves = [x.requires_grad_() for x in (*full, *shared, *vectors)]
    return leaves, (angle.cos(), angle.sin())


def call_mix(
    form: Callable[..., tuple[Mixed, Tensor, object]], rope: tuple[Tensor, ...], leaves: Leaves
) -> list[Tensor]:
    """The outputs of ``mix`` of the leaves of ``mix_inputs``, the bonus last."""
    r, decay, iclr, k, v, value, key, v_first, k_first, w0, a0, v0, k0, r_k = leaves
    rows = Rows(r=r, k=k, v=v, decay=decay, iclr=iclr, gate=r, value=value, key=key)
    weights = Weights(w0=w0, a0=a0, v0=v0, k0=k0, r_k=r_k, r_norm=None, k_norm=None)
    mixed, bonus, _ = form(rows, weights, form=FORM, rope=rope, first=(v_first, k_first))
    return [*mixed, bonus]


def finish_inputs(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> Leaves:
    """o, gate, v and bonus as leaves."""
    num_tokens, heads, kv_heads, size = shape
    full = [torch.randn(num_tokens, heads, size, dtype=dtype, device=device) for _ in range(2)]
    v = torch.randn(num_tokens, kv_heads, size, dtype=dtype, device=device)
    bonus = torch.randn(num_tokens, heads, device=device)
    return [x.requires_grad_() for x in (*full, v, bonus)]


def call_finish(form: Callable[..., Tensor], leaves: Leaves) -> list[Tensor]:
    """The output of ``finish`` of the leaves of ``finish_inputs``."""
    o, gate, v, bonus = leaves
    return [form(o, v, gate, bonus=bonus)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(x.numel() * x.element_size() for x in tensors)


def errors(ours: Call, exact: Call, leaves: Leaves) -> dict[str, float]:
    """The largest error of any output and of any gradient, relative to each tensor's largest element."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    outputs, expected = ours(leaves), exact(doubles)
    upstream = [torch.randn_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    expected_grads = torch.autograd.grad(expected, doubles, [x.double() for x in upstream])

    @torch.no_grad()
    def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)

    return {"outputs": worst(outputs, expected), "gradients": worst(grads, expected_grads)}


def measure(forms: dict[str, Call], leaves: Leaves, *, backward: bool, device: str) -> dict[str, float | str]:
    """Milliseconds of each form; one that fails is named in the note and the others go on."""
    found: dict[str, float | str] = {"note": ""}
    with torch.no_grad():
        upstream = [torch.randn_like(x) for x in forms["ours"](leaves)]
    for name, form in forms.items():

        def call(form: Call = form) -> object:
            if backward:
                return torch.autograd.grad(form(leaves), leaves, upstream)
            with torch.no_grad():
                return form(leaves)

        try:
            call()
            found[f"{name}_ms"] = round(median_ms(call, device=device, rep=150), 4)
        except Exception as error:  # whatever a form dies of, the others are worth their figures
            found["note"] = f"{found['note']} {name}: {type(error).__name__} {str(error)[:200]}".strip()
    return found


def rows_of(
    function: str, forms: dict[str, Call], leaves: Leaves, *, read_twice: Leaves, rate: float, device: str
) -> list[dict[str, float | str]]:
    """The table's rows of one function: forward, and forward with backward.

    read_twice: those leaves that the backward has to read again.
    """
    with torch.no_grad():
        outputs = nbytes(forms["ours"](leaves))
    forward = nbytes(leaves) + outputs
    backward = nbytes(read_twice) + outputs + nbytes(leaves)  # inputs, upstream gradients; gradients written
    table = []
    for name, size in (("forward", forward), ("forward+backward", forward + backward)):
        row: dict[str, float | str] = {"function": function, "pass": name}
        row |= measure(forms, leaves, backward=name != "forward", device=device)
        row["floor_ms"] = round(size / rate * 1e3, 4)
        ours = row.get("ours_ms")
        if isinstance(ours, float) and ours > 0:
            row["of_floor"] = round(row["floor_ms"] / ours, 3)
            for other in ("naive", "compile"):
                if isinstance(row.get(f"{other}_ms"), float):
                    row[f"{other}_ratio"] = round(row[f"{other}_ms"] / ours, 2)
        table.append(row)
        if device == "cuda":
            torch.cuda.empty_cache()
    return table


def benchmark(
    shape: Sequence[int], *, compiled: bool, rate: float, device: str
) -> list[dict[str, float | str]]:
    """Both functions at one shape."""
    leaves, rope = mix_inputs(shape, dtype=torch.bfloat16, device=device)
    forms: dict[str, Call] = {
        "ours": lambda leaves: call_mix(fused_mix.mix, rope, leaves),
        "naive": lambda leaves: call_mix(naive.mix, rope, leaves),
    }
    if compiled:
        compiled_mix = torch.compile(naive.mix, dynamic=False)
        forms["compile"] = lambda leaves: call_mix(compiled_mix, rope, leaves)
    table = rows_of("mix", forms, leaves, read_twice=leaves, rate=rate, device=device)
    del leaves
    leaves = finish_inputs(shape, dtype=torch.bfloat16, device=device)
    forms = {
        "ours": lambda leaves: call_finish(fused_finish.finish, leaves),
        "naive": lambda leaves: call_finish(naive.finish, leaves),
    }
    if compiled:
        compiled_finish = torch.compile(naive.finish, dynamic=False)
        forms["compile"] = lambda leaves: call_finish(compiled_finish, leaves)
    return table + rows_of("finish", forms, leaves, read_twice=leaves, rate=rate, device=device)


def check(device: str) -> dict[str, dict[str, float]]:
    """Errors of both functions on a small case; SystemExit where one is more than rounding."""
    found = {}
    for size in (32, 64, 96, 128):
        shape = (100, 8, 2, size)
        leaves, rope = mix_inputs(shape, dtype=torch.bfloat16, device=device)
        exact_rope = tuple(x.double() for x in rope)
        found[f"mix K={size}"] = errors(
            lambda x, rope=rope: call_mix(fused_mix.mix, rope, x),
            lambda x, rope=exact_rope: call_mix(naive.mix, rope, x),
            leaves,
        )
        found[f"finish K={size}"] = errors(
            lambda x: call_finish(fused_finish.finish, x),
            lambda x: call_finish(naive.finish, x),
            finish_inputs(shape, dtype=torch.bfloat16, device=device),
        )
    # The interpreter cuts fp32 to bf16 instead of rounding.
    allowed = ALLOWED if device == "cuda" else 2 * ALLOWED
    for name, error in found.items():
        print(f"{name}: " + ", ".join(f"{part} {x:.1e}" for part, x in error.items()), flush=True)
        if max(error.values()) > allowed:
            raise SystemExit(f"{name} differs from naive in fp64 by more than {allowed}: nothing is timed")
    return found


def main() -> None:
    """Compare, measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32768x64x8x96"], help="TxHxH_kvxK, bf16")
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument(
        "--device", default="cuda", help="cpu runs Triton's interpreter: tiny shapes, no figures"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    found = check(options.device)
    rate = copy_rate(options.device)
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}, copy {rate / 1e12:.2f} TB/s")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    table = []
    for text in options.shapes:
        shape = tuple(map(int, text.split("x")))
        for row in benchmark(shape, compiled=not options.skip_compile, rate=rate, device=options.device):
            row["shape"] = text
            print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |", flush=True)
            table.append(row)
    facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    facts |= {"python": platform.python_version(), "copy_tb_s": round(rate / 1e12, 3)}
    print(json.dumps({**facts, "errors": found, "rows": table}))


if __name__ == "__main__":
    main()
