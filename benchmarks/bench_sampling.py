"""What does choosing the next tokens of a batch cost, feature by feature?

    python benchmarks/bench_sampling.py                     # on a GPU, 20 s: [1, 64, 256] rows of 100,352
    python benchmarks/bench_sampling.py --device cpu --rows 2 --vocab 1000 --rep 1       # tries the script

A time is the median of ``sample`` on fp32 logits, launches included, as the engine calls it. The floor is the
time to read the logits once at the copy rate measured here; "of floor" is floor / time. "/ plain" is the time
over that of a temperature alone. The last line is JSON.
"""

import argparse
import json
from typing import Any

import torch
from timing import median_ms

from hrwkv.cli.display import Display
from hrwkv.engine.request import SamplingParams
from hrwkv.engine.sampling import SamplingBatch, SequenceSampling, TokenCounts, sample
from hrwkv.kernels.rates import copy_rate

# What every row asks for, and "one of all": one row with the costliest beside plain ones.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "min_p": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_k 1024, top_p 0.95": {"top_k": 1024, "top_p": 0.95},
    "top_p 0.95": {"top_p": 0.95},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logit_bias": {"logit_bias": dict.fromkeys(range(300), 1.0)},
    "20 logprobs": {"logprobs": 20},
}
HEADER = ["case", "rows", "ms", "floor ms", "of floor", "/ plain"]


def measure(case: dict[str, Any], rows: int, *, one: bool, options: argparse.Namespace) -> float:
    """Milliseconds of one call; one: only the first row has the case."""
    params = [SamplingParams(**case) if not one or not row else SamplingParams() for row in range(rows)]
    members = [SequenceSampling(each, row, 8, slot=row) for row, each in enumerate(params)]
    counts = TokenCounts(slots=rows, vocab_size=options.vocab, device=options.device)
    batch = SamplingBatch.build(members, vocab_size=options.vocab, device=options.device, counts=counts)
    logits = torch.randn(rows, options.vocab, device=options.device) * 3
    positions = torch.full((rows,), 9, device=options.device)
    sample(logits, batch, positions=positions)
    with torch.inference_mode():
        return median_ms(
            lambda: sample(logits, batch, positions=positions), device=options.device, rep=options.rep
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--vocab", type=int, default=100_352)
    parser.add_argument("--rep", type=int, default=100, help="milliseconds for each case")
    options = parser.parse_args()
    rate, report = copy_rate(options.device), []
    for rows in options.rows:
        floor, plain = rows * options.vocab * 4e3 / rate, None
        cases = [(name, case, False) for name, case in CASES.items()]
        for name, case, one in [*cases, ("one row of top_p 0.95", CASES["top_p 0.95"], True)]:
            row: dict[str, Any] = {"case": name, "rows": rows, "floor_ms": floor}
            try:
                row["ms"] = measure(case, rows, one=one, options=options)
            except RuntimeError as error:  # memory; the other cases are still wanted
                row["failed"] = str(error).splitlines()[0]
                report.append(row)
                continue
            plain = plain or row["ms"]
            report.append(row | {"of_floor": floor / row["ms"], "to_plain": row["ms"] / plain})
    cells = [
        [row["case"], str(row["rows"]), row["failed"], *["-"] * 3]
        if "failed" in row
        else [
            row["case"],
            str(row["rows"]),
            f"{row['ms']:.3f}",
            f"{row['floor_ms']:.3f}",
            f"{row['of_floor']:.0%}",
            f"{row['to_plain']:.1f}",
        ]
        for row in report
    ]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    Display().table(f"{name}, torch {torch.__version__}, {rate / 1e9:.0f} GB/s", HEADER, cells)
    print(json.dumps({"device": name, "torch": torch.__version__, "copy_rate": rate, "rows": report}))


if __name__ == "__main__":
    main()
