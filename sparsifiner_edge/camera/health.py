"""Prometheus metrics and a health check over HTTP, served to this machine only by default."""

from __future__ import annotations

import io
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from typing import Any

from sparsifiner_edge.bounds import whole_number
from sparsifiner_edge.camera.status import COUNTERS, STATES, UP_TO_S, Status
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.text import dump_json

LOOPBACK = "127.0.0.1"
"""Default host: metrics are served to this machine only."""
MOST_CONNECTIONS = 32
"""Connections open at a time, one thread each. Further ones are closed at once."""
DEADLINE_S = 5.0
"""Seconds for a complete request to arrive. After that the connection is closed, even if data still comes in."""
_MOST_REQUEST = 8192
"""Longest request in bytes."""


def parse_host_port(text: str) -> tuple[str, int]:
    """Parse [HOST:]PORT. Without a host it is this machine's loopback address; an IPv6 address stands in brackets.

    Raises:
        ConfigError: There is no port, or it is out of range.
    """
    host, _, port = text.rpartition(":")
    if not port:
        what = f"{text:.100} is not a [HOST:]PORT."
        raise ConfigError(what, f"Give 9090 to serve on {LOOPBACK}, or 0.0.0.0:9090 to serve on all addresses.")
    return host.strip("[]") or LOOPBACK, whole_number(port, f"The port of {text:.100}", 0, 65535)


class HealthServer(socketserver.ThreadingTCPServer):
    """Context manager that serves /metrics and /healthz from background threads.

    Args:
        address: Host and port; port 0 takes a free one.
        status: Status to show.
        stale_s: The health check fails when the last answer is older than this, in seconds.

    Attributes:
        url: Address of the metrics.

    Raises:
        ConfigError: The address cannot be used.
    """

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], status: Status, stale_s: float) -> None:
        self._status, self._stale_s = status, stale_s
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        host, port = address
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except (OSError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            what = f"Metrics cannot be served on {host:.100}:{port}: {reason}."
            raise ConfigError(what, "Choose another port or host.") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/metrics"

    def __enter__(self) -> HealthServer:
        threading.Thread(target=self.serve_forever, args=(0.1,), name="health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Return True if a connection is accepted: fewer than `MOST_CONNECTIONS` are open."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its own thread, and free its slot if the thread cannot be started."""
        try:
            super().process_request(request, client_address)
        except Exception:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the request, then free its slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that disconnect early, and threads that cannot be started."""

    def page(self, path: str) -> tuple[int, str, str]:
        """Return status code, media type and content for a path."""
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", "\n".join([*_metrics(self._status), ""])
        if path != "/healthz":
            return 404, "text/plain", "/metrics or /healthz\n"
        state, silent = self._status.state, self._status.silent_s()
        healthy = state == "streaming" and silent is not None and silent < self._stale_s
        silent = None if silent is None else round(silent, 3)
        content = {"healthy": healthy, "state": state, "reason": self._status.reason, "silent_s": silent}
        return 200 if healthy else 503, "application/json", dump_json(content, indent=None)


class _Handler(BaseHTTPRequestHandler):
    """Handler of one connection."""

    server: HealthServer
    server_version, sys_version = "sparsifiner-edge", ""

    def handle(self) -> None:
        """Read one request within fixed limits of size and time, and answer it.

        The standard library would accept megabytes, and would wait as long as a byte arrives now and then.
        """
        head, ends = b"", time.monotonic() + DEADLINE_S
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            if (seconds := ends - time.monotonic()) <= 0:
                return
            self.request.settimeout(seconds)
            if len(head) > _MOST_REQUEST or not (more := self.request.recv(_MOST_REQUEST)):
                return
            head += more
        self.rfile = io.BytesIO(head)
        self.handle_one_request()

    def do_GET(self) -> None:
        """Answer the request and close the connection."""
        code, kind, text = self.server.page(self.path.partition("?")[0])
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Do not log requests."""


def _metrics(status: Status) -> Iterator[str]:
    """Yield lines of Prometheus's text format: counters, states, gauges, and a histogram of each time."""
    for name, meaning in COUNTERS.items():
        yield from _metric(f"{name}_total", "counter", meaning, {"": status.counts[name]})
    states = {f'{{state="{name}"}}': name == status.state for name in STATES}
    yield from _metric("state", "gauge", "1 for the current state of the source, 0 for the others.", states)
    gauges = {"silent": status.silent_s(), "last_outage": status.recovered_s}
    for name, meaning in (("silent", "Time since the last answer."), ("last_outage", "Duration of the last outage.")):
        if (value := gauges[name]) is not None:
            yield from _metric(f"{name}_seconds", "gauge", meaning, {"": value})
    for name, counts in status.times.items():
        limits = [f'_bucket{{le="{limit}"}}' for limit in (*UP_TO_S, "+Inf")]
        below = list(accumulate(counts))
        parts = dict(zip(limits, below, strict=True)) | {"_sum": status.sums_s[name], "_count": below[-1]}
        yield from _metric(f"{name}_seconds", "histogram", f"Field {name}_ms of the records, in seconds.", parts)


def _metric(name: str, kind: str, meaning: str, values: Mapping[str, float]) -> list[str]:
    """Return the lines of one metric."""
    head = [f"# HELP sparsifiner_{name} {meaning}", f"# TYPE sparsifiner_{name} {kind}"]
    return head + [f"sparsifiner_{name}{part} {float(value)}" for part, value in values.items()]
