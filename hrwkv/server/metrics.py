"""What Prometheus reads at /metrics: the engine's counts at the moment of asking, and answers by status."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hrwkv.engine.core import BOUNDS, Histogram

if TYPE_CHECKING:
    from hrwkv.engine.engine import Engine

# Field of EngineStats -> what it is.
COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "prompt_tokens_reused": "Tokens of prompts that were kept from an earlier request, and not read again",
    "generated_tokens": "Tokens that were generated",
    "preempted": "Sequences that were put aside to make room",
}
GAUGES = {
    "queued": "Requests that wait",
    "running": "Sequences that run",
    "kv_blocks_used": "Blocks of the KV cache in use",
    "kv_blocks_total": "Blocks of the KV cache",
    "state_slots_used": "RWKV states in use",
    "state_slots_total": "RWKV states that fit",
    "state_bytes": "Bytes of RWKV states",
    "kv_bytes": "Bytes of the KV cache",
    "prefix_bytes": "Bytes of host memory in use for kept prefixes",
}
# Field of EngineStats -> name, and what it is.
HISTOGRAMS = {
    "first_token": ("time_to_first_token", "From a request's arrival to its first token"),
    "inter_token": ("inter_token", "From a token to the next one of the same sequence"),
}


class EngineCollector(Collector):
    """The engine's statistics, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One metric a field."""
        stats = self._engine.stats()
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"hrwkv_{name}", meaning, value=getattr(stats, name))
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"hrwkv_{name}", meaning, value=getattr(stats, name))
        for field, (name, meaning) in HISTOGRAMS.items():
            yield _histogram(f"hrwkv_{name}_seconds", meaning, getattr(stats, field))
        yield GaugeMetricFamily("hrwkv_healthy", "1 while the engine lives", value=self._engine.is_alive)


def _histogram(name: str, meaning: str, found: Histogram) -> Metric:
    """Prometheus counts what is up to each bound, all smaller values included."""
    bounds = [*(repr(bound) for bound in BOUNDS), "+Inf"]
    buckets = list(zip(bounds, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(name, meaning, buckets=buckets, sum_value=found.total)


class Metrics:
    """One registry for one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._responses = Counter(
            "hrwkv_http_responses",
            "Answers by path and status; 499: the client left",
            ("path", "status"),
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """An answer that was begun."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
