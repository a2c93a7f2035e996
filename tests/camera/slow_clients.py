"""What slow clients without end cost the metrics server, and how long a fresh one then waits.

Three processes on loopback: the real server with 1,024 file descriptors, as a system gives; clients that open 2,000
connections, each sending one byte of a request a second; and a fresh client that asks for /healthz ten times a second.
In turn the clients are none, keep what they opened (`kept`), and come again as soon as they are closed (`reopened`).

Judged: every fresh client is answered within 1 s, the server takes less than .1 of a core, its descriptors are few.

    python -m tests.camera.slow_clients [--connections 2000] [--seconds 10] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.camera import health
from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.results import Result, Subject, write_result

LATENCY_S, CORES, DESCRIPTORS = 1.0, 0.1, 200
SERVED = "sparsifiner_edge/camera/health.py"
KINDS = ("none", "kept", "reopened")
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: h\r\n"
_MODULE = "tests.camera.slow_clients"
_PATIENCE_S = 10.0
UNANSWERED_S = 100.0


def serve() -> None:
    """Print the port, serve until standard input ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    with HealthServer(("127.0.0.1", 0), Status("test", lambda _: None), 6.0) as server:
        print(server.url.rsplit(":", 1)[1].removesuffix("/metrics"), flush=True)
        sys.stdin.read()


class Slow:
    """Connections that send a byte of their request a second."""

    def __init__(self, port: int, count: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        self.port, self.opened, self.clients = port, 0, dict[int, socket.socket]()
        self._events = select.epoll()
        for _ in range(count):
            self.open()

    def open(self) -> None:
        """One more, which sends its first byte at once if it can."""
        client = socket.socket()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(("127.0.0.1", self.port))
        self.opened += 1
        self.clients[client.fileno()] = client
        self._events.register(client, select.EPOLLIN | select.EPOLLRDHUP)
        self._drip(client, 0)

    def _drip(self, client: socket.socket, second: int) -> None:
        with contextlib.suppress(OSError):  # Not yet connected, or closed: told by an event.
            client.send(_REQUEST[second % len(_REQUEST) :][:1])

    def run(self, seconds: float, reopen: bool) -> None:
        """Send, and come again or not, for so long."""
        start, second = time.monotonic(), 0
        while (passed := time.monotonic() - start) < seconds:
            if passed >= second + 1:
                second += 1
                for client in list(self.clients.values()):
                    self._drip(client, second)
            for number, _ in self._events.poll(0.1):
                self.clients.pop(number).close()
                if reopen:
                    self.open()


def clients(port: int, count: int, seconds: float, reopen: bool) -> None:
    """Be slow; a line when all have been opened, and one with their number at the end."""
    slow = Slow(port, count)
    print("ready", flush=True)
    slow.run(seconds, reopen)
    print(slow.opened, flush=True)


def ask(port: int) -> float:
    """Seconds until /healthz answered a fresh client; a hundred where it did not."""
    start = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as client:
            client.sendall(_REQUEST + b"\r\n")
            said = b""
            while more := client.recv(4096):
                said += more
    except OSError:
        return UNANSWERED_S
    return time.monotonic() - start if b'"state"' in said else UNANSWERED_S


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def entries(pid: int, name: str) -> int:
    """How many file descriptors (`fd`) or threads (`task`) a process has."""
    return len(list(Path(f"/proc/{pid}/{name}").iterdir()))


@contextlib.contextmanager
def role(*arguments: Any, **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """This file in a process of its own, ended with the block."""
    line = [sys.executable, "-m", _MODULE, *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def said_by(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def measure(kind: str, connections: int, seconds: float) -> dict[str, Any]:
    """One kind of clients against a server of its own."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(role("--serve", stdin=subprocess.PIPE))
        port = int(said_by(server))
        count = 0 if kind == "none" else connections
        slow = stack.enter_context(role("--slow", port, count, seconds + 2 * _PATIENCE_S, int(kind == "reopened")))
        assert said_by(slow) == "ready"
        start, used = time.monotonic(), cpu_s(server.pid)
        waits, descriptors, threads = list[float](), 0, 0
        while time.monotonic() < start + seconds:
            waits.append(ask(port))
            descriptors = max(descriptors, entries(server.pid, "fd"))
            threads = max(threads, entries(server.pid, "task"))
            time.sleep(0.1)
        cores = (cpu_s(server.pid) - used) / (time.monotonic() - start)
        return {"waits_s": waits, "cores": cores, "descriptors": descriptors, "threads": threads}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    waits = found["waits_s"]
    return {
        "asked": len(waits),
        "unanswered": waits.count(UNANSWERED_S),
        "median_wait_s": float(np.median(waits)),
        "longest_wait_s": max(waits),
        **{name: found[name] for name in ("cores", "descriptors", "threads")},
    }


def verdict(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    allowed = {"longest_wait_s": LATENCY_S, "cores": CORES, "descriptors": DESCRIPTORS}
    return [
        f"{kind}: {name} is {found[name]:.3g}, allowed {most}"
        for kind, found in figures.items()
        for name, most in allowed.items()
        if found[name] > most
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--slow", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve()
    if given.slow:
        port, count, seconds, reopen = given.slow
        return clients(int(port), int(count), float(seconds), reopen == "1")
    samples = {kind: measure(kind, given.connections, given.seconds) for kind in KINDS}
    figures = {kind: summary(found) for kind, found in samples.items()}
    wrong = verdict(figures)
    print(json.dumps(figures | {"wrong": wrong}, indent=2))
    if given.output is not None:
        allowed = {"wait_s": LATENCY_S, "cores": CORES, "descriptors": DESCRIPTORS}
        method = {"connections": given.connections, "seconds": given.seconds, "allowed": allowed}
        subject = Subject(path=SERVED, sha256=sha256(Path(health.__file__)))
        write_result(given.output, Result("evaluation", [subject], method, {}, {"kinds": figures, "wrong": wrong}))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
