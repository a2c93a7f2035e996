"""Tests with a real RTSP server on 127.0.0.1 (gst-rtsp-server), which is killed repeatedly or requires a password.

The server needs a Python with gi. Each image encodes its drawing time, and `sparsifiner-edge run` reads it with a
bundle whose features are the encoding squares: each record gives the true age of its frame from drawing to answer, with
encoder, network and decoder. With SOAK_MINUTES=10 in the environment, the server is killed every minute for that long.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera.pattern import BITS
from tests.camera.conftest import lines, needs_gst, number_of
from tests.commands import wait_for
from tests.once import WORKER

_PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
PYTHON = next(
    (
        python
        for python in ("/usr/bin/python3", sys.executable)
        if shutil.which(python)
        and subprocess.run([python, "-c", _PROBE], capture_output=True, check=False).returncode == 0
    ),
    "",
)
pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(not PYTHON, reason="no Python with GstRtspServer (python3-gi, gir1.2-gst-rtsp-server-1.0)"),
]


class Server:
    """RTSP server on a free port that can be killed and restarted."""

    def __init__(self, *way: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
        self.address = f"rtsp://127.0.0.1:{port}/camera"
        self._start = [PYTHON, str(Path(__file__).with_name("rtsp_server.py")), str(port), *way]
        self.start()

    def start(self) -> float:
        """Start the server; return the monotonic time at which it listens."""
        self.process = subprocess.Popen(self._start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout.readline() == "ready\n"
        return time.monotonic()

    def close(self) -> None:
        """Kill the server with SIGKILL."""
        self.process.kill()
        self.process.communicate()


def resident_kb(service: int) -> int:
    """Return the resident memory of a process and its descendants."""
    children = [path.read_text().split() for path in Path(f"/proc/{service}/task").glob("*/children")]
    total = 0
    for pid in (service, *(pid for some in children for pid in some)):
        with contextlib.suppress(OSError):  # It has exited meanwhile.
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    return total


@pytest.mark.long
def test_a_server_that_is_killed_again_and_again(cells: Path, service: Any, tmp_path: Path) -> None:
    """Recovery within five seconds, no frame older than 200 ms from the first one on, constant memory."""
    minutes, output, down_s = float(os.environ.get("SOAK_MINUTES", "0")), tmp_path / "lines", 3.0
    seconds, every_s = (minutes * 60, 60.0) if minutes else (40.0, 10.0)
    memory: list[tuple[float, int]] = []
    with contextlib.closing(Server()) as server:
        back = [time.monotonic()]
        with (tmp_path / "events").open("w") as events:
            run = service(cells, "--source", server.address, "--threads", 1, "--output", output, stderr=events)
        wait_for(lambda: output.exists() and output.stat().st_size, 30)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            due = began + min(passed + every_s - down_s, seconds)
            while time.monotonic() < due:
                memory.append((time.monotonic() - began, resident_kb(run.process.pid)))
                time.sleep(0.5)
            if time.monotonic() - began < seconds - every_s / 2:
                server.close()
                time.sleep(down_s)
                back.append(server.start())
        run.process.terminate()
        assert run.process.wait(20) == 0, (tmp_path / "events").read_text()
    records = lines(output.read_text())
    seen = []  # Answer time, age by the time in the image, and how much less the service reports.
    for record in records:
        if (number := number_of(record["features"])) is not None:
            age = (round(record["monotonic_s"] * 1000) - number) % (1 << BITS)
            seen.append((record["monotonic_s"], age, age - record["frame_age_ms"]))
    assert len(back) == seconds // every_s
    assert all(next(at for at, _, _ in seen if at > since) - since < 5 for since in back)
    # Next to other tests, a frame occasionally waits for a core.
    assert sum(age > 200 for _, age, _ in seen) <= (len(seen) / 200 if WORKER else 0)
    assert len(seen) > seconds * 25 * 0.5
    assert len(records) - len(seen) < len(seen) / 100
    # The age reported by the service misses only the server's own part.
    assert -5 < sorted(less for _, _, less in seen)[len(seen) // 2] < 100
    settling = min(60.0, memory[-1][0] / 3)
    assert max(kb for at, kb in memory if at > settling) < 1.05 * max(kb for at, kb in memory if at <= settling)


@pytest.mark.parametrize("way", ["basic", "digest"])
@pytest.mark.parametrize(("password", "served"), [("p%20ss%3A%2F", True), ("wrong", False)])
@pytest.mark.parametrize("through", ["", pytest.param("gst:", marks=needs_gst)])
def test_a_server_that_asks_for_a_password(
    through: str, way: str, password: str, served: bool, cells: Path, service: Any
) -> None:
    with contextlib.closing(Server(way)) as server:
        address = server.address.replace("127.0.0.1", f"us%40er:{password}@localhost")
        run = service(cells, "--source", through + address)
        if served:
            decoder = run.event(state="streaming")["decoder"]
            assert re.fullmatch(
                "[a-z0-9_]*dec[a-z0-9_]* of GStreamer, .*" if through else "h264 of FFmpeg, software", decoder
            )
            assert number_of(run.record()["features"]) is not None
        else:
            assert re.search("401|[Uu]nauthorized|not authorized", run.event(state="lost")["reason"])
        assert run.finish()[0] == 0


def test_a_server_that_hangs(cells: Path, service: Any) -> None:
    """The connection stays open without data: it is closed and opened again."""
    with contextlib.closing(Server()) as server:
        run = service(cells, "--source", server.address, "--stall", 1)
        run.record()
        server.process.send_signal(signal.SIGSTOP)
        assert run.event(state="lost")["reason"]
        server.process.send_signal(signal.SIGCONT)
        since = time.monotonic()
        run.event(state="streaming")
        assert time.monotonic() - since < 5
        assert run.finish()[0] == 0
