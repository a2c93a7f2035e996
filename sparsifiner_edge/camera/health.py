"""Prometheus metrics and a health check over HTTP, for this machine alone unless told otherwise."""

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
MOST_CONNECTIONS = 32
"""Open at a time, threads of the service itself included; one more is closed at once."""
DEADLINE_S, _MOST_REQUEST = 5.0, 8192
"""For a request to be whole, and bytes of it; else it is closed unanswered, however busy its client is."""


def parse_host_port(text: str) -> tuple[str, int]:
    """Read [HOST:]PORT; without a host it is this machine's loopback. An IPv6 address stands in brackets.

    Raises:
        ConfigError: no port.
    """
    host, _, port = text.rpartition(":")
    if not port:
        raise ConfigError(f"{text:.100} is no [HOST:]PORT.", f"Such as 9090, for {LOOPBACK}, or 0.0.0.0:9090 for all.")
    return host.strip("[]") or LOOPBACK, whole_number(port, f"The port of {text:.100}", 0, 65535)


class HealthServer(socketserver.ThreadingTCPServer):
    """Serves /metrics and /healthz from threads of its own. A context manager.

    Args:
        address: host and port; port 0 takes a free one.
        status: what is shown.
        stale_s: the health check fails when the last answer is older.

    Raises:
        ConfigError: the address cannot be used.
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
            said = f"Metrics cannot be served on {host:.100}:{port}: {reason}."
            raise ConfigError(said, "Choose another port or host.") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/metrics"

    def __enter__(self) -> HealthServer:
        threading.Thread(target=self.serve_forever, args=(0.1,), name="health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Whether a connection is taken on: not where too many are open."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, whose place is free again where it cannot be started."""
        try:
            super().process_request(request, client_address)
        except Exception:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer; then the place is free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that leave in the middle, and threads that cannot be started."""

    def page(self, path: str) -> tuple[int, str, str]:
        """Status, media type and content of a path."""
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
    server: HealthServer
    server_version, sys_version = "sparsifiner-edge", ""

    def handle(self) -> None:
        """The standard library would take megabytes, for as long as a byte comes now and then."""
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
        """Answer, and close."""
        code, kind, text = self.server.page(self.path.partition("?")[0])
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Requests are no events."""


def _metrics(status: Status) -> Iterator[str]:
    """Lines of Prometheus's text format: counters, states, gauges, and a histogram of each time of the records."""
    for name, what in COUNTERS.items():
        yield from _metric(f"{name}_total", "counter", what, {"": status.counts[name]})
    states = {f'{{state="{name}"}}': name == status.state for name in STATES}
    yield from _metric("state", "gauge", "1 for the state that the source is in.", states)
    gauges = {"silent": status.silent_s(), "last_outage": status.recovered_s}
    for name, what in (("silent", "Since the last answer."), ("last_outage", "How long the source was lost at last.")):
        if (value := gauges[name]) is not None:
            yield from _metric(f"{name}_seconds", "gauge", what, {"": value})
    for name, counts in status.times.items():
        limits = [f'_bucket{{le="{limit}"}}' for limit in (*UP_TO_S, "+Inf")]
        below = list(accumulate(counts))
        parts = dict(zip(limits, below, strict=True)) | {"_sum": status.sums_s[name], "_count": below[-1]}
        yield from _metric(f"{name}_seconds", "histogram", f"{name}_ms of the records.", parts)


def _metric(name: str, kind: str, what: str, values: Mapping[str, float]) -> list[str]:
    head = [f"# HELP sparsifiner_{name} {what}", f"# TYPE sparsifiner_{name} {kind}"]
    return head + [f"sparsifiner_{name}{part} {float(value)}" for part, value in values.items()]
