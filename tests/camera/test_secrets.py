"""No spelling of a password gets into what is shown: sources, messages, output, events, metrics, command lines."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.errors import SparsifinerError
from tests.camera.conftest import get

PARTS = ("hUn", "tEr2", "t0keN")
"""Of a password and a token; no spelling below may show one of them."""
SOURCES = [
    "rtsp://user:hUntEr2@h:554/x",
    "rtsp://t0keN@h/x",
    "rtsp://hUntEr2:@h/x",
    "rtsp://us@er:hUn:tEr2@h/x",
    "rtsp://user:hUn tEr2@h/x",
    "rtsp://user:hUn%40tEr2@[::1]:554/x",
    "rtsp://h/x?y=1&token=t0keN",
    "rtsp://h/x#t0keN",
    "rtsps://h:7441/4vYqt0keNBEmkRQ3Gm?enableSrtp",
    "gst:rtspsrc location=rtsp://user:hUntEr2@h/x?auth=t0keN ! decodebin",
    'gst:rtspsrc location="rtsp://us er:hUn tEr2@h/x" ! decodebin',
    "gst:rtspsrc user-pw = hUntEr2 ! decodebin",
    "gst:rtspsrc user-pw='hUn tEr2' proxy-pw=hUn\\ tEr2 ! decodebin",
    'gst:rtspsrc user-pw="hUn\\"tEr2" ! decodebin',
    "gst:rtspsrc 'user-pw=hUn!tEr2' ! decodebin",
    'gst:"rtspsrc location=rtsp://user:hUntEr2@h user-pw=hUntEr2 ! decodebin"',
    "gst:udpsrc ! application/x-srtp,srtp-key=(buffer)t0keN,t0keN ! srtpdec ! decodebin",
    # Taken for paths.
    "user:hUntEr2@h/x",
    "h/x?auth=t0keN",
]
UNREADABLE = [
    "rtsp://user:hUn/tEr2@h/x",
    "rtsp://user:hUn?tEr2@h/x",
    "rtsp:/user:hUntEr2@h/x",
    " rtsp://user:hUntEr2@h/x",
    "rtsp://user:hUntEr2@h:port/x",
    "rtsp://user:hUntEr2@[::1/x",
    "rtsp://user:hUntEr2@/x",
    "rtsp://user:hUntEr2@h/x\r\nHeader: y",
    "http://user:hUntEr2@h/x",
    "gst:rtspsrc user-pw='hUntEr2",
]


def assert_hidden(text: str) -> None:
    assert [part for part in PARTS if part in text] == []


@pytest.mark.parametrize("text", SOURCES)
def test_a_source_shows_no_secret(text: str) -> None:
    source = parse_source(text)
    assert_hidden(source.shown)
    if source.kind == "images":  # No decoder speaks of it.
        return
    # Nor does a message that quotes what was given.
    assert_hidden(source.clean(f"cannot open {source.location}: no"))
    for word in shlex.split(source.location) if source.kind == "gst" else []:
        assert_hidden(source.clean(f'could not set property in element "x0" to "{word.partition("=")[2] or word}".'))


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_source_that_cannot_be_read_shows_none_either(text: str) -> None:
    with pytest.raises(SparsifinerError) as caught:
        parse_source(text)
    assert_hidden(str(caught.value))
    assert_hidden(repr(caught.value.__cause__))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("rtsp://user:hUn%20tEr2@127.0.0.1:1/x?auth=t0keN", 0),
        ("gst:fakesrc num-buffers=t0keN ! fakesink dump=hUntEr2", 0),
        ("user:hUntEr2@h/x", 2),
    ],
)
def test_the_command_line(text: str, code: int, cells: Path, service: Any) -> None:
    """GStreamer's own messages quote what was given."""
    if text.startswith("gst:") and shutil.which("gst-launch-1.0") is None:
        pytest.skip("gst-launch-1.0 is not installed")
    run = service(cells, "--source", text)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(3)
    run.process.terminate()
    said = "".join(run.process.communicate(timeout=20))
    assert_hidden(said)
    assert run.process.returncode == code
    assert not text.startswith("gst:") or "could not set property" in said


def test_metrics_health_and_processes(cells: Path, service: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It never answers, so that the decoding process stays.
        port = silent.getsockname()[1]
        (tmp_path / "source").write_text(f"rtsp://user:hUntEr2@127.0.0.1:{port}/x?auth=t0keN\n")
        run = service(cells, "--source", f"@{tmp_path / 'source'}", "--metrics", "0", "--stall", 5)
        address = run.event(event="metrics")["address"]
        for pid in (run.process.pid, run.decoder()):
            process = Path(f"/proc/{pid}")
            assert_hidden((process / "cmdline").read_text() + (process / "environ").read_text())
    run.event(state="lost")
    assert_hidden(get(address)[1] + get(address.replace("/metrics", "/healthz"))[1])
    assert run.finish()[0] == 0
