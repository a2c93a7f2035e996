"""What the decoding process cannot do, each tried in a process that is confined as it is; and that it decodes so."""

from __future__ import annotations

import datetime
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
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sparsifiner_edge.camera import confine
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.records import write_record
from tests.camera.conftest import records_of
from tests.commands import process

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_ROOT = os.geteuid() == 0
USERS = [pytest.param(None, id="as started"), pytest.param(NOBODY, id="ordinary user", marks=pytest.mark.skipif(
    not AS_ROOT, reason="only root becomes another user"))]  # fmt: skip
pytestmark = pytest.mark.skipif(confine.confinement().landlock is None, reason="this kernel has no Landlock")
FILES = {
    "create", "truncate", "delete", "rename", "make a folder", "list a folder", "read a file", "read what is root's",
    "read the user's own", "spawn",
}  # fmt: skip
REFUSED = FILES | {"write its memory", "trace", "bind", "connect", "become root"}
ALLOWED = {"its one port", "look up a host"}


@functools.cache
def tried(user: int | None, landlock: int | None) -> dict[str, Any]:
    """What each try came to; made once."""
    folder = Path(tempfile.mkdtemp())
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    try:
        folder.chmod(0o777)
        (folder / "open").touch()
        (folder / "open").chmod(0o666)
        other, port = (server.getsockname()[1] for server in servers)
        request = {"folder": str(folder), "other": other, "port": port, "user": user, "landlock": landlock}
        done = subprocess.run(
            [sys.executable, "-m", "tests.camera.confined"],
            cwd=ROOT, input=json.dumps(request), capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        left = {path.name for path in folder.iterdir()}
    finally:
        for server in servers:
            server.close()
        shutil.rmtree(folder)
    results = {key: value for line in lines if isinstance(line, dict) for key, value in line.items()}
    possible = {name for name, outcome in results["tries"].items() if outcome == "done"}
    return results | {"possible": possible, "another program": "another program" in lines, "left": left}


@pytest.mark.parametrize("user", USERS)
def test_all_of_it_would_work_unconfined(user: int | None) -> None:
    """Or the tests below would say nothing."""
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
@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_older_versions_of_landlock(version: int) -> None:
    possible = tried(None, version)["possible"]
    assert possible & FILES == ({"truncate"} if version < 3 else set())
    assert ("connect" in possible) == (version < 4)


def test_a_video_with_sound(cells: Path, tmp_path: Path) -> None:
    """PyAV imports what a stream needs when it meets it; no file can be opened then."""
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        video, sound = file.add_stream("libx264", rate=10), file.add_stream("aac", rate=8000)
        assert isinstance(video, av.VideoStream)
        assert isinstance(sound, av.AudioStream)
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        for number in range(20):
            file.mux(video.encode(av.VideoFrame.from_ndarray(draw_pattern(number, 160, 120))))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            file.mux(sound.encode(samples))
        file.mux([*video.encode(None), *sound.encode(None)])
    assert len(records_of(process("run", cells, "--source", tmp_path / "v.mkv"))) == 20


def certify(folder: Path) -> None:
    """A key and a certificate of its own, for two days."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=2))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "certificate").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))


def test_an_encrypted_stream_of_a_host_by_name(tmp_path: Path) -> None:
    """Neither TLS nor the look-up needs a file that cannot be opened any more; no certificate is checked."""
    certify(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    events: list[dict[str, Any]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = parse_source(f"rtsps://u:p@localhost:{server.getsockname()[1]}/x")
        with Capture(source, 8, 5, Status(source.shown, events.append)):
            with context.wrap_socket(server.accept()[0], server_side=True) as client:
                assert client.recv(4096).startswith(b"OPTIONS rtsps://localhost:")
                client.sendall(b"RTSP/1.0 404 Not Found\r\nCSeq: 1\r\n\r\n")
            server.accept()[0].close()  # The next attempt.
    assert "404" in next(event["reason"] for event in events if event["state"] == "lost")


def test_the_decoding_process_is_confined(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test")
    run.record()
    event = run.event(event="decoding")
    assert event == {**event, **write_record(confine.confinement())}
    status = Path(f"/proc/{run.decoder()}/status").read_text()
    fields = dict(re.findall(r"^(NoNewPrivs|CapEff|Threads):\s+(\w+)$", status, re.MULTILINE))
    assert fields == {"NoNewPrivs": "1", "CapEff": "0" * 16, "Threads": "1"}
    assert run.finish()[0] == 0
