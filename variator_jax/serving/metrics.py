"""Prometheus metrics: requests as HTTP saw them, and the service's own state."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# The service's state -> help.
_GAUGES = {
    "ready": "1 when every program is compiled",
    "slo_ms": "The target of the 99th percentile of latency",
    "p50_ms": "Median latency of the last requests",
    "p99_ms": "99th percentile of the latency of the last requests",
    "queued": "Rows that wait",
    "queued_seconds": "Time that they take on the plugin in use",
    "busy": "Seconds of work that arrive each second, on the plugin in use",
    "ratio": "Compression ratio of the plugin in use",
    "slowdown": "Time of the last batches against that measured at the start",
}
_COUNTERS = {
    "compilations": "Programs compiled after the start: none is expected",
    "batches": "Batches",
    "refused": "Requests refused with 429",
}


class Metrics:
    """The metrics of one server.

    Args:
      snapshot: the service's state, `Service.snapshot`.
    """

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self.registry, self._snapshot = CollectorRegistry(), snapshot
        own: dict[str, Any] = {"namespace": "variator", "registry": self.registry}
        self.requests = Counter("requests", "Requests", ["path", "status"], **own)
        self.texts = Counter("texts", "Inputs that were answered", ["plugin"], **own)
        self.tokens = Counter("tokens", "Their tokens, without padding", ["plugin"], **own)
        headers = "From the headers to the answer"
        self.seconds = Histogram("request_seconds", headers, ["path"], buckets=_SECONDS, **own)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Of the service's state a gauge or a counter for each number that there is."""
        found = self._snapshot()
        for name in _GAUGES.keys() & found.keys():
            yield GaugeMetricFamily(f"variator_{name}", _GAUGES[name], value=float(found[name]))
        for name in _COUNTERS.keys() & found.keys():
            yield CounterMetricFamily(f"variator_{name}", _COUNTERS[name], value=found[name])
