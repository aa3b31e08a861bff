"""GPUs by their data sheets: what a plan is made for.

Per row: GiB that a program can use; dense TFLOP/s in fp32 (without TF32), bf16 and fp8, which is bf16's where
the chip has no fp8 units; TB/s of its memory. Sources: NVIDIA's data sheets of H100 SXM (80 GB),
H200 SXM, A100 SXM (80 GB) and RTX 4090 (Ada white paper, fp32 accumulation), AMD's of MI300X.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB, TERA = 2**30, 1e12


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: memory in bytes, dense FLOP/s in fp32, bf16 and fp8, bytes/s of its memory."""

    name: str
    memory: float
    fp32: float
    bf16: float
    fp8: float
    bandwidth: float


def _gpu(name: str, gib: float, fp32: float, bf16: float, fp8: float, bandwidth: float) -> Gpu:
    return Gpu(name, gib * GIB, fp32 * TERA, bf16 * TERA, fp8 * TERA, bandwidth * TERA)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", 79.2, 66.9, 989.0, 1979.0, 3.35),
        _gpu("h200", 139.8, 66.9, 989.0, 1979.0, 4.8),
        _gpu("mi300x", 191.5, 163.4, 1307.0, 2615.0, 5.3),
        _gpu("a100", 79.2, 19.5, 312.0, 312.0, 2.04),
        _gpu("rtx4090", 23.5, 82.6, 165.2, 330.3, 1.01),
        # Two cores in fp32, to plan and calibrate where no GPU is.
        _gpu("cpu", 8.0, 0.1, 0.1, 0.1, 0.02),
    )
}


def named_like(device: str) -> Gpu | None:
    """The GPU that a driver calls ``device``, like ``NVIDIA H200``; None if it is not in the table."""
    plain = device.lower().replace(" ", "")
    return next((gpu for name, gpu in GPUS.items() if name in plain), None)
