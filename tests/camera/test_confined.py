"""Tests of the sandbox of the decoding process: forbidden actions fail, and decoding works."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sparsifiner_edge.camera import confine
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.decoder_protocol import Wanted
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.records import write_record
from tests.camera.conftest import records_of
from tests.commands import process

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_ROOT = os.geteuid() == 0
USERS = [
    pytest.param(None, id="as started"),
    pytest.param(
        NOBODY, id="ordinary user", marks=pytest.mark.skipif(not AS_ROOT, reason="only root becomes another user")
    ),
]
pytestmark = pytest.mark.skipif(confine.confinement().landlock is None, reason="this kernel has no Landlock")
FILES = {
    "create",
    "truncate",
    "delete",
    "rename",
    "make a folder",
    "list a folder",
    "read a file",
    "read what is root's",
    "read the user's own",
    "spawn",
}
REFUSED = FILES | {"write its memory", "trace", "bind", "connect", "become root"}
ALLOWED = {"its one port", "look up a host"}


def tried(user: int | None, landlock: int | None) -> dict[str, Any]:
    """Return the outcome of each attempt."""
    listen = functools.partial(socket.create_server, ("127.0.0.1", 0))
    with tempfile.TemporaryDirectory() as folder, listen() as one, listen() as other:
        Path(folder).chmod(0o777)
        (Path(folder) / "open").touch()
        (Path(folder) / "open").chmod(0o666)
        ports = {"other": other.getsockname()[1], "port": one.getsockname()[1]}
        done = subprocess.run(
            [sys.executable, "-m", "tests.camera.confined"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            input=json.dumps({"folder": folder, "user": user, "landlock": landlock} | ports),
            timeout=60,
        )
        left = {path.name for path in Path(folder).iterdir()}
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    results = {key: value for line in lines if isinstance(line, dict) for key, value in line.items()}
    possible = {name for name, outcome in results["tries"].items() if outcome == "done"}
    return results | {"possible": possible, "another program": "another program" in lines, "left": left}


@pytest.mark.parametrize("user", USERS)
def test_all_of_it_would_work_unconfined(user: int | None) -> None:
    """Without this, the tests below would prove nothing."""
    results = tried(user, 0)
    impossible = {"become root", "read what is root's"} if user or not AS_ROOT else set()
    assert results["possible"] >= (REFUSED | ALLOWED) - impossible
    assert results["mark"].startswith("TAKEN")
    assert results["another program"]


@pytest.mark.parametrize("user", USERS)
def test_confined_it_cannot(user: int | None) -> None:
    results = tried(user, None)
    assert results["possible"] & REFUSED == set()
    assert results["possible"] >= ALLOWED
    assert results["mark"] == "untouched"
    assert not results["another program"]
    assert results["left"] == {"open", "own", "deleted", "renamed"}
    assert results["user"] == (NOBODY if user else results["user"])
    assert not AS_ROOT or user or results["user"] in confine._USERS


@pytest.mark.everything
@pytest.mark.parametrize("version", [2, 3, 4])
def test_older_versions_of_landlock(version: int) -> None:
    possible = tried(None, version)["possible"]
    assert possible & FILES == ({"truncate"} if version < 3 else set())
    assert ("connect" in possible) == (version < 4)


def test_a_video_with_sound(cells: Path, tmp_path: Path) -> None:
    """PyAV imports modules when it meets a stream that needs them; no file can be opened then."""
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        video, sound = file.add_stream("libx264", rate=10), file.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        for number in range(20):
            file.mux(video.encode(av.VideoFrame.from_ndarray(draw_pattern(number, 160, 120))))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            file.mux(sound.encode(samples))
        file.mux([*video.encode(None), *sound.encode(None)])
    assert len(records_of(process("run", cells, "--source", tmp_path / "v.mkv"))) == 20


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_an_encrypted_stream_of_a_host_by_name(tmp_path: Path) -> None:
    """Neither TLS nor name resolution needs a file that is no longer accessible; no certificate is checked."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -days 2 -keyout key -out certificate"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    events: list[dict[str, Any]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = parse_source(f"rtsps://u:p@localhost:{server.getsockname()[1]}/x")
        with Capture(source, Wanted(Framing(8)), 5, Status(source.shown, events.append)):
            with context.wrap_socket(server.accept()[0], server_side=True) as client:
                assert client.recv(4096).startswith(b"OPTIONS rtsps://localhost:")
                client.sendall(b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\n\r\n")
            server.accept()[0].close()  # The next attempt.
    assert "404" in next(event["reason"] for event in events if event["state"] == "lost")


def test_the_decoding_process_is_confined_limited_and_quiet(
    cells: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits are those of every started process: see `sparsifiner_edge.process`."""
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    run = service(cells, "--source", "test")
    run.record()
    event = run.event(event="decoding")
    assert event == {**event, **write_record(confine.confinement())}
    decoder = run.decoder()
    status, limits, environment = (Path(f"/proc/{decoder}/{x}").read_text() for x in ("status", "limits", "environ"))
    fields = dict(re.findall(r"^(NoNewPrivs|CapEff|Threads):\s+(\w+)$", status, re.MULTILINE))
    assert fields == {"NoNewPrivs": "1", "CapEff": "0" * 16, "Threads": "1"}
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert int(re.findall(r"^Max open files +(\d+)", limits, re.MULTILINE)[0]) <= 4096
    assert "ORT_DISABLE_TELEMETRY=1" in environment.split("\0")
    assert os.getsid(decoder) == decoder
    assert run.finish()[0] == 0
