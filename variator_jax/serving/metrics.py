"""Prometheus metrics: requests as HTTP saw them, and the service's own state."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """The metrics of one server.

    Args:
      snapshot: the service's state, `Service.snapshot`.
    """

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self.registry = registry = CollectorRegistry()
        counter = functools.partial(Counter, namespace="variator", registry=registry)
        self.requests = counter("requests", "Requests", ["path", "status"])
        self.texts = counter("texts", "Inputs that were answered", ["plugin"])
        self.tokens = counter("tokens", "Their tokens, without padding", ["plugin"])
        self.seconds = Histogram(
            "variator_request_seconds",
            "From the headers to the answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        registry.register(_State(snapshot))
        ProcessCollector(registry=registry)


class _State(Collector):
    """The numbers of a snapshot: whole ones that only grow are counters, the others gauges."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """One metric for each number."""
        for name, value in self._snapshot().items():
            if isinstance(value, (bool, int, float)):
                yield GaugeMetricFamily(f"variator_{name}", name, value=float(value))

    def describe(self) -> Iterator[Metric]:
        """Nothing: a snapshot needs no look before it is asked for."""
        return iter(())
