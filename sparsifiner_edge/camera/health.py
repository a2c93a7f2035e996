"""Prometheus metrics and a health check over HTTP, for this machine alone unless told otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from sparsifiner_edge.bounds import whole_number
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.server import Page, PageServer, listen
from sparsifiner_edge.camera.status import COUNTERS, STATES, Status
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.text import dump_json

LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"[A-Za-z0-9._-]{0,253}|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")
_TIMES = {
    "capture_ms": "from a frame's taking to its decoding",
    "preprocess_ms": "resizing",
    "wait_ms": "between the decoding process and the model",
    "infer_ms": "the model",
    "postprocess_ms": "from outputs to the record",
    "end_to_end_ms": "from arrival to the answer",
    "frame_age_ms": "age of the frame when its answer was ready (live sources)",
}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def parse_address(text: str) -> tuple[str, int]:
    """Read [HOST:]PORT; without a host it is this machine's loopback. An IPv6 address stands in brackets.

    Raises:
        ConfigError: no port, or a host of other characters than those of addresses and ASCII names.
    """
    host, _, port = text.rpartition(":")
    if not port or not _HOST.fullmatch(host):
        raise ConfigError(f"{text:.100} is no [HOST:]PORT.", f"Such as 9090, for {LOOPBACK}, or 0.0.0.0:9090 for all.")
    return host.strip("[]") or LOOPBACK, whole_number(port, f"The port of {text:.100}", 0, 65535)


class HealthServer:
    """Serves /metrics and /healthz from a thread of its own. A context manager.

    Args:
        address: host and port; port 0 takes a free one.
        status: what is shown.
        stale_s: the health check fails when the last answer is older.

    Raises:
        ConfigError: the address cannot be used.
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, address: tuple[str, int], status: Status, stale_s: float) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "camera") from error
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=registry)
        registry.register(_Collector(status))
        self._times = {
            name: prometheus_client.Histogram(
                f"sparsifiner_{name.removesuffix('_ms')}_seconds",
                f"Seconds {what}.",
                buckets=_BUCKETS_S,
                registry=registry,
            )
            for name, what in _TIMES.items()
        }
        status.watchers.append(self._observe)
        self._server = PageServer(
            listen(address),
            {
                "/metrics": lambda: Page(200, _METRICS_TYPE, prometheus_client.generate_latest(registry)),
                "/healthz": lambda: _health_page(status, stale_s),
            },
        )
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{host}:{self._server.port}/metrics"

    def __enter__(self) -> HealthServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _observe(self, record: FrameRecord) -> None:
        for name, histogram in self._times.items():
            if (taken_ms := getattr(record, name)) is not None:
                histogram.observe(taken_ms / 1000)


class _Collector:
    """Counters and states, read when they are asked for."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"sparsifiner_{name}", what, value=self._status.counts[name])
        state = GaugeMetricFamily("sparsifiner_state", "1 for the state that the source is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(name == self._status.state))
        yield state
        for name, what, value in (
            ("silent_seconds", "Since the last answer.", self._status.silent_s()),
            ("last_outage_seconds", "How long the source was lost the last time.", self._status.recovered_s),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"sparsifiner_{name}", what, value=value)


class Health(msgspec.Struct, frozen=True):
    """Whether answers come, and what there is to say."""

    healthy: bool
    state: str
    reason: str | None
    silent_s: float | None


def health(status: Status, stale_s: float) -> Health:
    """A run's health, now."""
    silent = status.silent_s()
    healthy = status.state == "streaming" and silent is not None and silent < stale_s
    return Health(healthy, status.state, status.reason, None if silent is None else round(silent, 3))


def _health_page(status: Status, stale_s: float) -> Page:
    found = health(status, stale_s)
    content = dump_json(msgspec.to_builtins(found), indent=None)
    return Page(200 if found.healthy else 503, "application/json", content.encode())
