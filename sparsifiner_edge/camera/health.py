"""Prometheus metrics and a health check over HTTP, for this machine alone unless told otherwise."""

from __future__ import annotations

import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

from sparsifiner_edge.camera.status import STATES, Status
from sparsifiner_edge.errors import ConfigError, MissingExtraError

LOOPBACK = "127.0.0.1"
_TIMES = {
    "capture_ms": "from a frame's taking to its decoding",
    "preprocess_ms": "resizing",
    "wait_ms": "between the decoding process and the model",
    "infer_ms": "the model",
    "postprocess_ms": "from outputs to the record",
    "end_to_end_ms": "from arrival to the answer",
    "frame_age_ms": "age of the frame when its answer was ready (live sources)",
}
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_COUNTS = {
    "captured": "Frames decoded.",
    "processed": "Frames that the model answered.",
    "dropped": "Frames replaced by a newer one before the model was free.",
    "bad_packets": "Damaged packets.",
    "reconnects": "Returns of a source that was lost.",
    "stalls": "Times that the decoder hung and was ended.",
    "crashes": "Times that the decoding process crashed.",
    "lines_dropped": "Records that the reader of the output was too slow for.",
    "output_errors": "Records that could not be written.",
    "overlay_errors": "Times that the overlay could not be written and was given up.",
}


def parse_address(text: str) -> tuple[str, int]:
    """Read [HOST:]PORT; without a host it is this machine's loopback.

    Raises:
        ConfigError: no port.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{text} is no [HOST:]PORT.", f"Such as 9090, for {LOOPBACK}, or 0.0.0.0:9090 for all.")
    return host.strip("[]") or LOOPBACK, int(port)


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
        handler = _handler(status, stale_s, lambda: prometheus_client.generate_latest(registry))
        try:
            self._server = (_Server6 if ":" in address[0] else _Server)(address, handler)
        except OSError as error:
            raise ConfigError(
                f"Metrics cannot be served on {address[0]}:{address[1]}: {error.strerror}.", "Choose another port."
            ) from error
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{host}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _observe(self, record: dict[str, Any]) -> None:
        for name, histogram in self._times.items():
            if name in record:
                histogram.observe(record[name] / 1000)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def server_bind(self) -> None:
        # Without the library's question to the name server for the address's name.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, *_: Any) -> None:
        """A client that leaves in the middle is none of the service's troubles."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Collector:
    """Counters and states, read when they are asked for."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, what in _COUNTS.items():
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


def _handler(status: Status, stale_s: float, metrics: Any) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5  # Of a client that sends nothing.
        server_version = "sparsifiner-edge"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(200, "text/plain; version=0.0.4; charset=utf-8", metrics())
            elif self.path == "/healthz":
                healthy, content = health(status, stale_s)
                self._send(200 if healthy else 503, "application/json", json.dumps(content).encode() + b"\n")
            else:
                self._send(404, "text/plain", b"/metrics or /healthz\n")

        def _send(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def health(status: Status, stale_s: float) -> tuple[bool, dict[str, Any]]:
    """Whether answers come, and what there is to say."""
    silent = status.silent_s()
    healthy = status.state == "streaming" and silent is not None and silent < stale_s
    shown = None if silent is None else round(silent, 3)
    return healthy, {"healthy": healthy, "state": status.state, "reason": status.reason, "silent_s": shown}
