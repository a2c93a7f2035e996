"""Metrics and health, also under clients that are slow, rude or many: a fresh one is answered, and none stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera import health
from sparsifiner_edge.camera.health import HealthServer, parse_host_port
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ConfigError
from tests.camera.conftest import get, metric

GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


def test_metrics_and_health(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test", "--metrics", "[::1]:0", "--stall", 1)
    address = run.event(event="metrics")["address"]
    assert address.startswith("http://[::1]:")
    for _ in range(10):
        run.record()
    for name, least in (("processed_total", 10), ('state{state="streaming"}', 1), ("infer_seconds_count", 10)):
        assert metric(address, name) >= least
    assert metric(address, 'state{state="lost"}') == 0
    assert metric(address, "frame_age_seconds_sum") > 0
    assert metric(address, 'infer_seconds_bucket{le="+Inf"}') >= 10
    checked = address.replace("/metrics", "/healthz")
    code, text = get(checked)
    assert (code, json.loads(text)["reason"]) == (200, None)
    assert get(address.replace("/metrics", "/"))[0] == 404
    os.kill(run.decoder(), signal.SIGSTOP)
    run.event(state="stalled")
    code, text = get(checked)
    assert (code, json.loads(text)["healthy"]) == (503, False)
    assert list(json.loads(text)) == ["healthy", "state", "reason", "silent_s"]
    run.event(state="streaming")
    assert run.finish()[0] == 0


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
        ([b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\n"], b"400"),
    ],
)
def test_any_request_is_answered_and_the_next_one_too(port: int, parts: list[bytes], code: bytes) -> None:
    said = answer_to(port, *parts)
    assert said == b"" or code in said[:600], said[:200]
    assert answer_to(port, GET).startswith(b"HTTP/1.0 503")


def test_addresses() -> None:
    known = {"9090": ("127.0.0.1", 9090), "0.0.0.0:80": ("0.0.0.0", 80), ":7": ("127.0.0.1", 7), "[::1]:5": ("::1", 5)}
    assert {text: parse_host_port(text) for text in known} == known
    for text in ("127.0.0.1:" + "9" * 5000, "\u0663\u0663\u0663", "", "x", "1:", "70000", "-1"):
        with pytest.raises(ConfigError) as caught:
            parse_host_port(text)
        assert caught.value.fix
        assert len(caught.value.what) < 300


@pytest.mark.parametrize("host", ["a..b", "\u00fc" * 70, "a\0b", "a\u202eb", "x" * 5000, "127.0.0.1"])
def test_an_address_that_cannot_be_served(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="Metrics cannot be served") as caught:
            HealthServer((host, port), Status("test", lambda _: None), 2.0)
    assert caught.value.what.isprintable()
