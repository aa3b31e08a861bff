"""What the benchmarks share: the median time of a call."""

import time
from collections.abc import Callable


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
