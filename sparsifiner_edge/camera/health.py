"""Prometheus metrics and a health check over HTTP, for this machine alone unless told otherwise.

No client can hold the run up: one thread does for each what goes without waiting; connections and their time are few.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from sparsifiner_edge.bounds import whole_number
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.status import COUNTERS, STATES, Status
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.text import dump_json

LOOPBACK = "127.0.0.1"
MOST_CONNECTIONS = 128
"""Open at a time; one more closes the oldest."""
DEADLINE_S = 5.0
"""From a connection's beginning to its end, however busy its client is."""
_TURN_S, _MOST_NEW = 0.02, 50
"""So many new connections are taken in a turn."""
_MOST_REQUEST = 8192
_HOST = re.compile(r"[A-Za-z0-9._-]{0,253}|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")
_TIMES = ("capture", "preprocess", "wait", "infer", "postprocess", "end_to_end", "frame_age")
_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def parse_host_port(text: str) -> tuple[str, int]:
    """Read [HOST:]PORT; without a host it is this machine's loopback. An IPv6 address stands in brackets.

    Raises:
        ConfigError: no port, or a host of other characters than those of addresses and ASCII names.
    """
    host, _, port = text.rpartition(":")
    if not port or not _HOST.fullmatch(host):
        raise ConfigError(f"{text:.100} is no [HOST:]PORT.", f"Such as 9090, for {LOOPBACK}, or 0.0.0.0:9090 for all.")
    return host.strip("[]") or LOOPBACK, whole_number(port, f"The port of {text:.100}", 0, 65535)


@dataclasses.dataclass
class _Client:
    """A connection, when it is closed on the monotonic clock, and its request as far as it has come."""

    connection: socket.socket
    until: float
    request: bytes = b""
    answered: bool = False


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
        self._status, self._stale_s = status, stale_s
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        self._registry.register(_Collector(status))
        self._times = {
            name: prometheus_client.Histogram(
                f"sparsifiner_{name}_seconds", f"{name}_ms of the records.", buckets=_BUCKETS_S, registry=self._registry
            )
            for name in _TIMES
        }
        status.watchers.append(self._observe)
        self._listener = _listen(address)
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self.url = f"http://{host}:{self._listener.getsockname()[1]}/metrics"
        self._clients: list[_Client] = []
        self._pages: dict[str, tuple[int, str, bytes]] = {}
        """Those of this turn: each is made once, however many ask for it."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for client in self._clients:
            client.connection.close()
        self._listener.close()

    def _observe(self, record: FrameRecord) -> None:
        for name, histogram in self._times.items():
            if (taken_ms := getattr(record, f"{name}_ms")) is not None:
                histogram.observe(taken_ms / 1000)

    def _run(self) -> None:
        arrivals = select.poll()
        arrivals.register(self._listener, select.POLLIN)
        while not self._stop.wait(_TURN_S):
            if not self._clients:
                arrivals.poll(200)
            self._pages.clear()
            with contextlib.suppress(OSError):  # None waits; or one has left already, or no descriptor is to spare.
                for _ in range(_MOST_NEW):
                    self._accept()
            self._clients = [client for client in self._clients if self._goes_on(client)]

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        if len(self._clients) >= MOST_CONNECTIONS:
            self._clients.pop(0).connection.close()
        self._clients.append(_Client(connection, time.monotonic() + DEADLINE_S))

    def _goes_on(self, client: _Client) -> bool:
        """Do what goes without waiting; False once the connection is over, and closed."""
        with contextlib.suppress(OSError):  # A client that leaves in the middle is none of the service's troubles.
            if time.monotonic() < client.until and self._step(client):
                return True
        client.connection.close()
        return False

    def _step(self, client: _Client) -> bool:
        """Read what has come, and answer what is complete; False when the client has left."""
        try:
            more = client.connection.recv(_MOST_REQUEST)
        except BlockingIOError:
            return True
        if not client.answered:
            client.request += more
            if (answer := self._answer(client.request)) is not None:
                client.connection.send(answer)  # The kernel has room for a page.
                client.connection.shutdown(socket.SHUT_WR)
                client.answered = True
        # Closed while the client still sends, the connection would be reset, and the answer with it.
        return bool(more)

    def _answer(self, request: bytes) -> bytes | None:
        """What a request gets; None while it is not complete."""
        first, line_ended, _ = request.partition(b"\n")
        method, path, *_ = [*first.decode("latin-1").split()[:2], "", ""]
        is_http, complete = b" HTTP/1." in first, re.search(rb"\n\r?\n", request) is not None
        if not complete and (is_http or not line_ended) and len(request) < _MOST_REQUEST:
            return None
        if not (complete and is_http):
            code, kind, content = 400, "text/plain", b"no HTTP, or too long\n"
        elif method not in ("GET", "HEAD"):
            code, kind, content = 405, "text/plain", b"GET or HEAD\n"
        else:
            code, kind, content = self._page(path.partition("?")[0])
        head = (
            f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase}\r\nServer: sparsifiner-edge\r\nAllow: GET, HEAD\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else content)

    def _page(self, path: str) -> tuple[int, str, bytes]:
        """Status, media type and content of a path."""
        if path not in ("/metrics", "/healthz"):
            return 404, "text/plain", b"/metrics or /healthz\n"
        if path not in self._pages:
            try:
                self._pages[path] = self._metrics() if path == "/metrics" else self._health()
            except Exception:  # The thread must live on, whatever it meets.
                self._pages[path] = 500, "text/plain", b"no answer could be made\n"
        return self._pages[path]

    def _metrics(self) -> tuple[int, str, bytes]:
        import prometheus_client

        return 200, "text/plain; version=0.0.4; charset=utf-8", prometheus_client.generate_latest(self._registry)

    def _health(self) -> tuple[int, str, bytes]:
        state, silent = self._status.state, self._status.silent_s()
        healthy = state == "streaming" and silent is not None and silent < self._stale_s
        silent = None if silent is None else round(silent, 3)
        content = {"healthy": healthy, "state": state, "reason": self._status.reason, "silent_s": silent}
        recent = self._status.novelty
        if recent.unlike:
            content |= {"novelty": recent.text, "unlike": recent.alarm, "repeated": recent.repeated}
        return 200 if healthy else 503, "application/json", dump_json(content, indent=None).encode()


def _listen(address: tuple[str, int]) -> socket.socket:
    """A socket that waits for clients.

    Raises:
        ConfigError: the host has no address here, the port is taken, or the system refuses.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        address[0].encode("idna")  # What can be no name is told before there is a socket.
        listener = socket.create_server(address, family=family, backlog=4096)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Metrics cannot be served on {address[0]}:{address[1]}: {reason}.", "Choose another port or host."
        ) from error
    listener.setblocking(False)
    return listener


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
            ("novelty", "Of the last frame; above 1 it is unlike the calibration's.", self._status.novelty.last),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"sparsifiner_{name}", what, value=value)
