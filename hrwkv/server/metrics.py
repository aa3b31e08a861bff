"""What Prometheus reads at /metrics: the engine's counts at the moment of asking, and answers by status."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hrwkv.engine.engine import Engine


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Field of EngineStats -> what it is.
COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were read",
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
        yield GaugeMetricFamily("hrwkv_healthy", "1 while the engine lives", value=self._engine.is_alive)


class Metrics:
    """One registry for one server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._responses = Counter(
            "hrwkv_http_responses",
            "Answers by path and status; 499: the client left",
            ("path", "status"),
            registry=self._registry,
        )
        self._first = Histogram(
            "hrwkv_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._next = Histogram(
            "hrwkv_inter_token_seconds",
            "From a token to the next one of the same sequence",
            buckets=SECONDS,
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """An answer that was begun."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        latencies = self._engine.drain_latencies()
        for seconds in latencies.first_token:
            self._first.observe(seconds)
        for seconds in latencies.inter_token:
            self._next.observe(seconds)
        return generate_latest(self._registry)
