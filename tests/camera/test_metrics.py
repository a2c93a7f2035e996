"""Tests of metrics and health with slow or many clients (hostile clients: tests.fuzz): new clients get an answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera import health
from sparsifiner_edge.camera.health import HealthServer, parse_host_port
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ConfigError
from tests.camera.conftest import get, metric
from tests.commands import ended, wait_for


def test_metrics_and_health_while_a_decoder_hangs_and_crashes(cells: Path, service: Any) -> None:
    """A decoder that hangs is ended; none outlives a killed service."""
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
    hung, since = run.decoder(), time.monotonic()
    os.kill(hung, signal.SIGSTOP)
    assert "decoder was ended" in run.event(state="stalled")["reason"]
    code, text = get(checked)
    assert (code, json.loads(text)["healthy"]) == (503, False)
    assert list(json.loads(text)) == ["healthy", "state", "reason", "silent_s"]
    assert run.event(state="streaming")["lost_s"] < 8
    assert time.monotonic() - since < 10
    assert not Path(f"/proc/{hung}").exists()
    os.kill(run.decoder(), signal.SIGSEGV)
    assert run.event(state="lost")["reason"] == "the decoder crashed"
    run.event(state="streaming")
    assert [metric(address, f"{name}_total") for name in ("crashes", "stalls", "reconnects")] == [1, 1, 2]
    decoder = run.decoder()
    run.process.kill()
    wait_for(lambda: ended(decoder), 5)


def health_of(port: int) -> bytes:
    said = b""
    with socket.create_connection(("127.0.0.1", port), 20) as client, contextlib.suppress(ConnectionError):
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        while more := client.recv(4096):
            said += more
    return said


def test_too_many_connections_are_closed_and_those_that_dribble_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "DEADLINE_S", 0.5)
    with HealthServer(("127.0.0.1", 0), Status("test", lambda _: None), 2.0) as server:
        port, descriptors, ends = server.server_address[1], Path("/proc/self/fd"), time.monotonic() + 20
        before = len(list(descriptors.iterdir()))
        clients = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(4 * health.MOST_CONNECTIONS)]
        while not health_of(port).startswith(b"HTTP/1.0 503"):  # An occasional byte does not keep a connection.
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"x")
            assert time.monotonic() < ends
        for client in clients:
            client.close()
        wait_for(lambda: len(list(descriptors.iterdir())) <= before)


def test_addresses() -> None:
    known = {"9090": ("127.0.0.1", 9090), "0.0.0.0:80": ("0.0.0.0", 80), ":7": ("127.0.0.1", 7), "[::1]:5": ("::1", 5)}
    assert {text: parse_host_port(text) for text in known} == known
    for text in ("127.0.0.1:" + "9" * 5000, "\u0663\u0663\u0663", "", "x", "1:", "70000", "-1"):
        with pytest.raises(ConfigError) as caught:
            parse_host_port(text)
        assert caught.value.fix
        assert len(caught.value.what) < 300
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host in ("a..b", "\u00fc" * 70, "a\0b", "a\u202eb", "x" * 5000, "127.0.0.1"):
            with pytest.raises(ConfigError, match="Metrics cannot be served") as caught:
                HealthServer((host, taken.getsockname()[1]), Status("test", lambda _: None), 2.0)
            assert caught.value.what.isprintable()
