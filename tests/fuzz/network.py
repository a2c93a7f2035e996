"""Tries with hostile clients of the metrics server."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.status import Status
from tests.fuzz.harness import FailureError, Try
from tests.fuzz.mutate import mutated_bytes

_GET = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n"
_WAIT_S = 0.15


@contextlib.contextmanager
def _no_thread_fails() -> Iterator[None]:
    """What ends a thread of ours with an error of its own ends the try."""
    lost: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda found: lost.append(f"{found.exc_type.__name__}: {found.exc_value}")
    try:
        yield
    finally:
        threading.excepthook = before
    if lost:
        raise FailureError(f"a thread ended with {lost[0]}")


def http(one: Try) -> None:
    status = Status("test", lambda _: None)
    with _no_thread_fails(), HealthServer(("127.0.0.1", 0), status, 2.0) as server:
        port = int(re.findall(r":(\d+)/", server.url)[0])
        for _ in range(8):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
                client.sendall(mutated_bytes(_GET * one.rng.choice((1, 1, 3)), one.rng))
                if one.rng.random() < 0.5:
                    client.shutdown(socket.SHUT_WR)
                client.settimeout(_WAIT_S)
                client.recv(1 << 16)
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.settimeout(2)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = client.recv(1 << 16)
    if b" 503 " not in answer.partition(b"\r\n")[0]:
        raise FailureError(f"health answers {answer[:100]!r}")
