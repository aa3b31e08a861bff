import pytest
import torch

from hrwkv.kernels import rates


def test_rates_count_each_byte_twice_and_each_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that gives every call half a second."""
    clock = iter(range(1000))
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock) / 2)
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1000)
    monkeypatch.setitem(rates.MATMUL_SIZE, "cpu", 10)
    assert rates.copy_rate("cpu") == 4000
    assert rates.matmul_rate("cpu", dtype=torch.float32) == 4000


def test_the_median_leaves_out_the_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [100.0] * 3 + [2.0] * 8 + [50.0] * 7
    times = [0.0]
    for duration in durations:
        times += [times[-1] + duration] * 2
    clock = iter(times)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1000)
    assert rates.copy_rate("cpu") == 1000
