"""What the benchmarks share: the median time of a call, and the rate at which a device copies memory."""

import time
from collections.abc import Callable

import torch


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


def copy_rate(device: str = "cuda") -> float:
    """Bytes a second of a large copy, reads and writes counted.

    Launched, not replayed: the same copy inside a CUDA graph was slower by a third.
    """
    source = torch.empty(2**30 if device == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), device=device, rep=150)
