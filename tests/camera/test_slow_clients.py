"""The metrics server under clients that are slow, rude or many: a fresh one is answered, and none stays."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsifiner_edge.camera import health
from sparsifiner_edge.camera.health import HealthServer, parse_host_port
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ConfigError

GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server in this process."""
    monkeypatch.setattr(health, "DEADLINE_S", 0.5)
    with HealthServer(("127.0.0.1", 0), Status("test", lambda _: None), 2.0) as server:
        yield server.server_address[1]


def answer_to(port: int, *parts: bytes) -> bytes:
    said = b""
    with socket.create_connection(("127.0.0.1", port), 20) as client, contextlib.suppress(ConnectionError):
        for part in parts:
            client.sendall(part)
        while more := client.recv(4096):
            said += more
    return said


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_too_many_connections_are_closed_and_those_that_dribble_end(port: int) -> None:
    before = descriptors()
    clients = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(4 * health.MOST_CONNECTIONS)]
    ends = time.monotonic() + 20
    while not answer_to(port, GET).startswith(b"HTTP/1.0 503"):  # A byte now and then does not keep a place.
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(b"x")
        assert time.monotonic() < ends
    for client in clients:
        client.close()
    while descriptors() > before:
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([b"GET /" + b"x" * 90_000 + b"\r\n\r\n"], b"414"),
        ([b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 2000], b"431"),
        ([b"GET /healthz HTTP/1.1\r\nA: " + b"x" * 60_000 + b"\r\n\r\n"], b"431"),
        ([b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n"], b"400"),
        ([b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n"], b"501"),
        ([b"GET /../../etc/passwd HTTP/1.1\r\n\r\n"], b"404"),
        ([bytes([byte]) for byte in GET], b"503"),
        ([GET * 3], b"503"),
    ],
)
def test_any_request_is_answered_and_the_next_one_too(port: int, parts: list[bytes], code: bytes) -> None:
    said = answer_to(port, *parts)
    assert said == b"" or code in said.split(b"\r\n")[0] + said[:600], said[:200]
    assert answer_to(port, GET).startswith(b"HTTP/1.0 503")


@pytest.mark.parametrize(
    "text", ["9" * 5000, "127.0.0.1:" + "9" * 5000, "\u0663\u0663\u0663", "", "x", "1:", "70000", "-1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_host_port(text)
    assert caught.value.fix
    assert len(caught.value.what) < 300


@pytest.mark.parametrize("host", ["a..b", "\u00fc" * 70, "a\0b", "a b", "a\u202eb", "x" * 5000])
def test_a_host_that_cannot_be_a_name(host: str) -> None:
    with pytest.raises(ConfigError, match="Metrics cannot be served") as caught:
        HealthServer((host, 0), Status("test", lambda _: None), 2.0)
    assert caught.value.what.isprintable()
