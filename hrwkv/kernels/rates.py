"""What a device can do at best, measured where a program runs: bytes copied and operations a second.

Floors of a step's time come from these, not from a data sheet, which no program reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Large enough that no cache holds it.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
REPEATS = 15


def copy_rate(device: str = "cuda") -> float:
    """Bytes a second of a large copy, reads and writes counted.

    Launched, not replayed: the same copy inside a CUDA graph was slower by a third.
    """
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: str = "cuda", *, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of one large square matrix product."""
    size = MATMUL_SIZE[device]
    x = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(x, x), device)


def _median_seconds(call: Callable[[], object], device: str) -> float:
    """Of one call, between CUDA events or by the clock; the first three are not counted."""
    seconds = []
    for _ in range(REPEATS + 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3:])
