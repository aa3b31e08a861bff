"""What the benchmarks share: the median time of a call, and how what was measured is shown."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from hrwkv.kernels.rates import copy_rate

Row = Mapping[str, object]


def median_ms(call: Callable[[], object], *, device: str = "cuda", rep: int = 100) -> float:
    """Median by CUDA events over about ``rep`` milliseconds, caches cold; of a CPU, which only tests use,
    one call."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    import triton.testing

    median: float = triton.testing.do_bench(call, warmup=20, rep=rep, return_mode="median")
    return median


def facts(device: str) -> dict[str, float | str]:
    """The machine that is measured: device, torch, and copy_tb_s, 10^12 bytes read and written a second."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "copy_tb_s": copy_rate(device) / 1e12}


def report(
    rows: Iterable[Row], columns: Sequence[str], *, about: Row, failures: Sequence[str], start: float
) -> None:
    """Print each row as it comes, in a table, then what failed, then all of it as a line of JSON.

    failures: read after the last row. start: ``time.perf_counter()`` of the script's.
    """
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    shown = []
    for row in rows:
        shown.append(row)
        cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in map(row.get, columns))
        print("| " + " | ".join(cells) + " |", flush=True)
    for failure in failures:
        print("failed:", failure)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({**about, "seconds": seconds, "failures": failures, "rows": shown}))
