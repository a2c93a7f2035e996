"""A real RTSP server on 127.0.0.1 that is killed, returns, and returns with another image."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.camera.cells import number_of
from tests.camera.soak import Server, missed, python_with_rtsp, soak
from tests.once import WORKER

PYTHON = python_with_rtsp()
pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(
        PYTHON is None, reason="no Python with gi and GstRtspServer (python3-gi, gir1.2-gst-rtsp-server-1.0)"
    ),
]


@pytest.mark.long
def test_a_server_that_is_killed_again_and_again(cells: Path) -> None:
    assert PYTHON is not None
    found = soak(PYTHON, cells, seconds=40, every_s=10)
    assert found["kills"] == 3
    # Beside other tests a frame now and then waits for a core; the benchmark, which runs alone, allows none.
    assert found["older_than_200_ms"] <= (found["frames"] / 200 if WORKER else 0), found
    assert missed(found | {"older_than_200_ms": 0}) == [], found
    assert found["frames"] > 40 * 25 * 0.5
    assert found["unread"] < found["frames"] / 100
    # What the service says of a frame's age misses only the server's own part.
    assert -5 < found["told_less_ms"] < 100


@pytest.mark.parametrize("way", ["basic", "digest"])
@pytest.mark.parametrize(("password", "served"), [("p%20ss%3A%2F", True), ("wrong", False)])
def test_a_server_that_asks_for_a_password(way: str, password: str, served: bool, cells: Path, service: Any) -> None:
    assert PYTHON is not None
    with Server(PYTHON, way) as server:
        address = server.address.replace("127.0.0.1", f"us%40er:{password}@localhost")
        run = service(cells, "--source", address)
        if served:
            assert number_of(run.record()["features"]) is not None
        else:
            assert "401" in run.event(state="lost")["reason"]
        assert run.finish()[0] == 0


def test_a_server_that_returns_with_another_size(cells: Path, service: Any) -> None:
    assert PYTHON is not None
    with Server(PYTHON, 25, 640, 480) as server:
        run = service(cells, "--source", server.address)
        assert number_of(run.record()["features"]) is not None
        server.kill()
        assert run.event(state="lost")["reason"]
        since = server.start(25, 320, 320)
        run.event(state="streaming")
        assert time.monotonic() - since < 5
        seen = [run.record() for _ in range(60)]
        assert number_of(seen[-1]["features"]) is not None
        code, _, events = run.finish()
    assert (code, events[-1]["reconnects"]) == (0, 1)


def test_a_server_that_hangs(cells: Path, service: Any) -> None:
    """The connection stays, nothing comes: it is given up and made anew."""
    assert PYTHON is not None
    with Server(PYTHON) as server:
        run = service(cells, "--source", server.address, "--stall", 1)
        run.record()
        server.process.send_signal(signal.SIGSTOP)
        assert run.event(state="lost")["reason"]
        server.process.send_signal(signal.SIGCONT)
        since = time.monotonic()
        run.event(state="streaming")
        assert time.monotonic() - since < 5
        assert run.finish()[0] == 0
