"""How fast, how large and how exact is the distillation loss on a GPU, beside Liger-Kernel's and fla's?

    python benchmarks/bench_losses.py --peers DIR_OF_liger_kernel DIR_OF_fla DIR_OF_einops    # about 90 s
    python benchmarks/bench_losses.py --quick                                                 # about 20 s

KL(p_T || p_S) of two heads with its gradient on the student's hidden states; hidden states are bf16, both
heads bf16 and frozen. ``hrwkv`` is ``distillation_loss`` with several chunks of positions. What the others do
with the same inputs (by their sources; all make the gradient in the forward pass and allow two widths):

- fla's fused_kl_div: logits rounded to bf16, softmax in fp32, gradient in bf16.
- Liger's fused_linear_jsd with jsd_beta = 0: logits in fp32, a chain of PyTorch operations, gradient in bf16.
- Liger's chunked JSD loss with beta = 0: logits and softmax in bf16, always makes the frozen head's gradient.
- Liger's fused_linear_kl_div wants the teacher's probabilities as a [T, V] tensor: another task, left out.

Errors are against fp64 on a smaller case, whose logits spread as a model's do. floor is 2*T*D*V*3 operations
(two models' logits, the gradient) at the rate measured here for one large bf16 product. ``products`` are the
three alone, chunk by chunk, ``elementwise`` what lies between them. The last line is JSON.
"""

import argparse
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import median_ms
from torch import Tensor

from hrwkv.distill import losses

# Bytes a logit that the forms of hrwkv.kernels.kl read and write, with a gradient in bf16.
BYTES = {"fused": 18, "inplace_torch": 126}
# student_hidden, student_head, teacher_hidden, teacher_head -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(*inputs: Tensor, chunk: int | None) -> Tensor:
    """Our loss as the trainer calls it: under autocast."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return losses.distillation_loss(*inputs, chunk_tokens=chunk)[0]


def fla_loss(*inputs: Tensor) -> Tensor:
    """Fla takes (student, teacher, student's head, teacher's head)."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    hidden, head, teacher_hidden, teacher_head = inputs
    return fused_kl_div_loss(hidden, teacher_hidden, head, teacher_head)


def liger_loss(*inputs: Tensor) -> Tensor:
    """Liger's Triton form; beta 0 is KL(teacher || student)."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(*inputs, None)


def liger_chunked_loss(*inputs: Tensor) -> Tensor:
    """Liger's chunked form in PyTorch; it cannot leave a head's gradient out. Not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(inputs[0]), dtype=torch.int64, device=inputs[0].device)
    form = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    return form(*inputs, labels)


def forms(chunks: Sequence[int]) -> dict[str, Loss]:
    """Everything that is compared; a chunk of 0 positions is our default."""
    mine = {f"hrwkv {chunk or 'default'}": functools.partial(ours, chunk=chunk or None) for chunk in chunks}
    return {**mine, "fla": fla_loss, "liger": liger_loss, "liger chunked": liger_chunked_loss}


def make_inputs(tokens: int, width: int, teacher_width: int, vocab: int) -> tuple[Tensor, ...]:
    """Hidden states and heads in bf16, with logits of standard deviation 3 and a student near its teacher."""
    options = {"device": "cuda", "dtype": torch.float32}
    teacher = torch.randn(tokens, teacher_width, **options)
    student = teacher[:, :width] + 0.3 * torch.randn(tokens, min(width, teacher_width), **options)
    teacher_head = torch.randn(vocab, teacher_width, **options).mul_(3 * teacher_width**-0.5)
    head = teacher_head[:, : student.shape[1]]
    inputs = (student, head, teacher, teacher_head)
    hidden, *others = (x.bfloat16().contiguous() for x in inputs)
    return hidden.requires_grad_(), *others


def exact(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64 with autograd."""
    hidden, head, teacher_hidden, teacher_head = (x.detach().double() for x in inputs)
    hidden.requires_grad_()
    log_student = (hidden @ head.T).log_softmax(-1)
    log_teacher = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    loss = (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def errors(form: Loss, inputs: Sequence[Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative error of the loss, and of the gradient by its norm."""
    loss = form(*inputs)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    exact_loss, exact_gradient = expected
    return {
        "loss_error": ((loss.double() - exact_loss) / exact_loss).abs().item(),
        "dhidden_error": ((gradient.double() - exact_gradient).norm() / exact_gradient.norm()).item(),
    }


def time_form(form: Loss, inputs: Sequence[Tensor], *, floor: float) -> dict[str, float]:
    """Milliseconds of loss and gradient, and memory beyond the inputs."""

    def step() -> None:
        torch.autograd.grad(form(*inputs), inputs[0])

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    milliseconds = median_ms(step, rep=300)
    return {"ms": milliseconds, "to_floor": milliseconds / floor, "peak_gib": peak / 2**30, "first_s": first}


def products(inputs: Sequence[Tensor], chunk: int) -> dict[str, float]:
    """The three products of one chunk alone, as ours makes them, scaled to all positions."""
    hidden, head, teacher_hidden, teacher_head = (x.detach() for x in inputs)
    own, other = hidden[:chunk], teacher_hidden[:chunk]
    gradient = torch.randn(chunk, len(head), device="cuda").bfloat16()

    def step() -> None:
        torch.mm(own, head.T, out_dtype=torch.float32)
        torch.mm(other, teacher_head.T, out_dtype=torch.float32)
        torch.mm(gradient, head, out_dtype=torch.float32)

    return {"ms": median_ms(step, rep=300) * len(hidden) / chunk}


def elementwise(name: str, chunk: int, tokens: int, vocab: int) -> dict[str, float]:
    """What lies between the products, by one form of hrwkv.kernels.kl, scaled to all positions."""
    form = importlib.import_module(f"hrwkv.kernels.kl.{name}").distillation_terms
    # A form may overwrite its inputs: its time does not depend on what they hold.
    logits = [3 * torch.randn(chunk, vocab, device="cuda") for _ in range(2)]
    options = {"labels": None, "kl_scale": 1.0, "ce_scale": 0.0, "gradient_dtype": torch.bfloat16}
    milliseconds = median_ms(functools.partial(form, *logits, **options), rep=300)
    return {
        "ms": milliseconds * tokens / chunk,
        "tb_per_s": chunk * vocab * BYTES[name] / milliseconds * 1e-9,
    }


def matrix_rate() -> float:
    """Operations a second of one 8192 x 8192 x 8192 product in bf16."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / (median_ms(lambda: x @ x, rep=300) * 1e-3)


def attempt(report: dict[str, Any], name: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Add what ``measure`` gives to a row; a failure is told and stops nothing else."""
    row = report["rows"].setdefault(name, {})
    try:
        row |= measure()
    # Not importable, out of memory, a compiler's refusal: whatever a peer raises.
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
    torch.cuda.empty_cache()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure errors, then times."""
    rate = matrix_rate()
    floor = 2 * options.tokens * options.width * options.vocab * 3 / rate * 1e3
    sizes = {size: getattr(options, size) for size in ("tokens", "width", "vocab")}
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **sizes}
    report |= {"matrix_tflops": rate * 1e-12, "floor_ms": floor, "rows": {}}
    chunks = [0] if options.quick else options.chunks
    # Different widths: a peer that cannot do that fails here, not in the times.
    small = make_inputs(512, 384, 512, 32000)
    expected = exact(small)
    for name, form in forms(chunks).items():
        attempt(report, name, functools.partial(errors, form, small, expected))
    inputs = make_inputs(options.tokens, options.width, options.width, options.vocab)
    for name, form in forms(chunks).items():
        attempt(report, name, functools.partial(time_form, form, inputs, floor=floor))
    for chunk in chunks:
        positions = min(options.tokens, chunk or losses.chunk_positions(options.vocab, inputs[0].device))
        attempt(report, f"products {positions}", functools.partial(products, inputs, positions))
        for form in ("fused", "inplace_torch"):
            row = functools.partial(elementwise, form, positions, options.tokens, options.vocab)
            attempt(report, f"elementwise {form} {positions}", row)
    return report


def main() -> None:
    """Measure, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=6144)
    parser.add_argument("--vocab", type=int, default=100352)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 512, 1024, 2048], help="0: our default")
    parser.add_argument(
        "--peers", nargs="*", default=[], help="directories to import liger_kernel and fla from"
    )
    parser.add_argument("--quick", action="store_true", help="our default chunk only")
    options = parser.parse_args()
    sys.path[:0] = options.peers
    torch.manual_seed(0)
    start = time.perf_counter()
    report = run(options)
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(
        f"{report['device']}, torch {report['torch']}, bf16 products {report['matrix_tflops']:.0f} TFLOP/s, "
        f"floor {report['floor_ms']:.1f} ms, {report['seconds']} s in all\n"
    )
    mine = [row["ms"] for name, row in report["rows"].items() if name.startswith("hrwkv") and "ms" in row]
    columns = ("ms", "to_floor", "ratio", "peak_gib", "loss_error", "dhidden_error", "first_s", "tb_per_s")
    print("| form | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for name, row in report["rows"].items():
        if name in forms([]) and "ms" in row:
            row["ratio"] = row["ms"] / min(mine, default=math.nan)  # to ours at its best chunk
        cells = [f"{row[column]:.3g}" if column in row else "" for column in columns]
        print(f"| {name} | " + " | ".join(cells) + f" | {row.get('failed', '')}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
