"""The metrics server under clients that are slow, rude or many: a fresh one is answered, and little is spent."""

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
from tests.camera import slow_clients

pytestmark = pytest.mark.everything

GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server in this process."""
    with HealthServer(("127.0.0.1", 0), Status("test", lambda _: None), 2.0) as server:
        yield port_of(server)


def port_of(server: HealthServer) -> int:
    return int(server.url.rsplit(":", 1)[1].split("/")[0])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


def rest(client: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    said = b""
    while more := client.recv(4096):
        said += more
    return said


def answer_to(port: int, *parts: bytes, half_close: bool = False) -> bytes:
    with connect(port) as client:
        for part in parts:
            client.sendall(part)
            if len(parts) > 1:
                time.sleep(0.01)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return rest(client)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("kind", ["kept", "reopened"])
def test_clients_without_end(kind: str) -> None:
    """As `slow_clients.py` measures it, with limits for a busy machine."""
    found = slow_clients.summary(slow_clients.measure(kind, 1500, 2))
    assert found["unanswered"] == 0
    assert found["longest_wait_s"] < 5
    assert found["descriptors"] < health.MOST_CONNECTIONS + 20
    assert found["cores"] < 0.3


def test_the_oldest_makes_room(port: int) -> None:
    before = descriptors()
    clients = [connect(port) for _ in range(health.MOST_CONNECTIONS + 50)]
    for client in clients:
        client.sendall(b"GET /")
    with clients[0]:
        assert_closed(clients[0])
    assert answer_to(port, GET).startswith(b"HTTP/1.1 503 ")
    assert descriptors() - before < len(clients) + health.MOST_CONNECTIONS + 5
    with clients[-1]:
        clients[-1].sendall(GET.removeprefix(b"GET /"))
        assert b'"healthy": false' in rest(clients[-1])
    for client in clients:
        client.close()


def test_the_whole_request_has_a_deadline(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the client sends a byte; one that never reads its answer is closed, too."""
    monkeypatch.setattr(health, "DEADLINE_S", 0.5)
    with connect(port) as dripping, connect(port) as deaf:
        deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        drip(dripping)
        drip(deaf)
        assert deaf.recv(12) == b"HTTP/1.1 200"


def drip(client: socket.socket) -> None:
    """Until the other side has closed."""
    deadline = time.monotonic() + 20
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while client.send(b"x"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def assert_closed(client: socket.socket) -> None:
    """Without an answer."""
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


REQUESTS = [
    ("a line without end", [b"GET /" + b"x" * 9000], 400),
    ("too many headers", [b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 2000], 400),
    ("HTTP/0.9", [b"GET /healthz\r\n"], 400),
    ("no HTTP", [b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n"], 400),
    ("another method", [b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 5000], 405),
    ("a body", [GET + b"x" * 100_000], 503),
    ("no such page", [b"GET /../../etc/passwd HTTP/1.1\r\n\r\n"], 404),
    ("bytes one by one", [bytes([byte]) for byte in GET], 503),
    ("bare line feeds", [b"GET /healthz?x=1 HTTP/1.0\n\n"], 503),
]


def test_any_request_is_answered_once_and_closed(port: int) -> None:
    for name, parts, code in REQUESTS:
        for half_close in (False, True):
            said = answer_to(port, *parts, half_close=half_close)
            assert status_of(said) == code, (name, said)
            assert said.count(b"HTTP/1.1") == 1
            head, _, content = said.partition(b"\r\n\r\n")
            assert f"Content-Length: {len(content)}".encode() in head
            assert b"Connection: close" in head
    assert answer_to(port, GET * 3).count(b"HTTP/1.1 503") == 1
    assert answer_to(port, GET.removesuffix(b"\r\n"), half_close=True) == b""


def test_head(port: int) -> None:
    head, _, content = answer_to(port, b"HEAD /metrics HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert content == b""
    assert status_of(head) == 200
    assert int(head.split(b"Content-Length: ")[1].split(b"\r")[0]) > 1000


def test_nothing_is_left_at_the_end() -> None:
    before = descriptors()
    with HealthServer(("127.0.0.1", 0), Status("test", lambda _: None), 2.0) as server:
        clients = [connect(port_of(server)) for _ in range(5)]
        clients[0].sendall(GET)
        assert status_of(clients[0].recv(4096)) == 503
    with clients[0]:
        assert clients[0].recv(1) == b""
    for client in clients[1:]:
        with client:
            assert_closed(client)
    assert descriptors() == before


def test_a_page_that_cannot_be_made_takes_no_other_with_it() -> None:
    class Broken(Status):
        def silent_s(self) -> float | None:
            raise RuntimeError

    status = Broken("test", lambda _: None)
    with HealthServer(("127.0.0.1", 0), status, 2.0) as server:
        for _ in range(2):
            assert status_of(answer_to(port_of(server), GET)) == 500
        assert status_of(answer_to(port_of(server), b"GET / HTTP/1.1\r\n\r\n")) == 404


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "127.0.0.1:" + "9" * 5000, "\u0663\u0663\u0663\u0663", "m\u00fcnchen:80", "a\u202eb:80",
     "a\0b:80", "a b:80", "[a]b]:80", "[:80", "a\x1b[2J:80"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_host_port(text)
    assert caught.value.fix
    assert len(caught.value.what) < 300
    assert caught.value.what.isprintable()


def test_a_host_that_cannot_be_a_name() -> None:
    for host in ("a..b", "\u00fc" * 70):
        with pytest.raises(ConfigError, match="Metrics cannot be served"):
            HealthServer((host, 0), Status("test", lambda _: None), 2.0)
