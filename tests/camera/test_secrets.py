"""No spelling of a password gets into what is shown: sources, messages, output, events, metrics, command lines."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import SparsifinerError
from tests.camera.test_service import get, needs_gst

PARTS = ("hUn", "tEr2", "t0keN")
"""Of a password and a token; no spelling below may show one of them."""
ADDRESSES = [
    "rtsp://user:hUntEr2@h:554/x",
    "RTSP://user:hUntEr2@h",
    "rtsp://t0keN@h/x",
    "rtsp://hUntEr2:@h/x",
    "rtsp://us@er:hUntEr2@h/x",
    "rtsp://user:hUn:tEr2@h/x",
    "rtsp://user:hUn tEr2@h/x",
    "rtsp://user:hUn%40tEr2@[::1]:554/x",
    "rtsp://h/x?y=1&token=t0keN",
    "rtsp://h?t0keN",
    "rtsp://h/x#t0keN",
    "rtsp://h/user=a&password=hUntEr2&channel=1",
    "rtsps://h:7441/4vYqt0keNBEmkRQ3Gm?enableSrtp",
]
UNREADABLE = [
    "rtsp://user:hUn/tEr2@h/x",
    "rtsp://user:hUn#tEr2@h/x",
    "rtsp://user:hUn?tEr2@h/x",
    "rtsp:/user:hUntEr2@h/x",
    "rtsp:user:hUntEr2@h/x",
    " rtsp://user:hUntEr2@h/x",
    "rtsp://user:hUntEr2@h:port/x",
    "rtsp://user:hUntEr2@h:99999/x",
    "rtsp://user:hUntEr2@[::1/x",
    "rtsp://user:hUntEr2@/x",
    "rtsp://user:hUntEr2@h/x\r\nHeader: y",
    "http://user:hUntEr2@h/x",
    "gst:rtspsrc user-pw='hUntEr2",
    "gst:",
]
PIPELINES = [
    "rtspsrc location=rtsp://user:hUntEr2@h/x?auth=t0keN ! decodebin",
    'rtspsrc location="rtsp://us er:hUn tEr2@h/x" ! decodebin',
    "rtspsrc user-pw = hUntEr2 ! decodebin",
    "rtspsrc user-pw='hUn tEr2' proxy-pw=hUn\\ tEr2 ! decodebin",
    'rtspsrc user-pw="hUn\\"tEr2" ! decodebin',
    "rtspsrc 'user-pw=hUn!tEr2' ! decodebin",
    "srtsrc uri=srt://h:7001?passphrase=hUntEr2&streamid=t0keN ! decodebin",
    '"rtspsrc location=rtsp://user:hUntEr2@h user-pw=hUntEr2 ! decodebin"',
    "udpsrc ! application/x-srtp,srtp-key=(buffer)t0keN,t0keN ! srtpdec ! decodebin",
    "uridecodebin uri=rtsp://user:hUntEr2@h/x name=t0 t0. ! queue",
]


def assert_hidden(text: str) -> None:
    assert [part for part in PARTS if part in text] == []


@pytest.mark.parametrize("text", [*ADDRESSES, *(f"gst:{pipeline}" for pipeline in PIPELINES)])
def test_a_source_shows_no_secret(text: str) -> None:
    source = parse_source(text)
    assert_hidden(source.shown)
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
    "text",
    ["user:hUntEr2@h/x", "//user:hUntEr2@h/x", "rtsp;//user:hUntEr2@h/x", "h/x?auth=t0keN"],
)
def test_what_is_taken_for_a_path_but_is_none(text: str) -> None:
    assert_hidden(parse_source(text).shown)


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://user:hUn%20tEr2@127.0.0.1:1/x?auth=t0keN",
        "rtsp://user:hUn/tEr2@127.0.0.1:1/x",
        "gst:rtspsrc location=rtsp://user:hUntEr2@127.0.0.1:1/x user-pw = t0keN ! decodebin",
        "gst:hUntEr2 user-pw=t0keN",
        "gst:fakesrc name=hUntEr2@ num-buffers=t0keN ! nosuch password=hUntEr2",
        "user:hUntEr2@h/x",
    ],
)
def test_the_command_line(text: str, cells: Path, service: Any) -> None:
    if text.startswith("gst:") and shutil.which("gst-launch-1.0") is None:
        pytest.skip("gst-launch-1.0 is not installed")
    run = service(cells, "--source", text)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(3)
    run.process.terminate()
    assert_hidden("".join(run.process.communicate(timeout=20)))
    assert run.process.returncode == (0 if text.startswith(("gst:", "rtsp://user:hUn%")) else 2)


def test_metrics_health_and_processes(cells: Path, service: Any, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("rtsp://user:hUntEr2@127.0.0.1:1/x?auth=t0keN\n")
    run = service(cells, "--source", f"@{tmp_path / 'source'}", "--metrics", "0")
    address = run.event(event="metrics")["address"]
    run.event(state="lost")
    assert_hidden(get(address)[1] + get(address.replace("/metrics", "/healthz"))[1])
    for pid in (run.process.pid, run.decoder()):
        process = Path(f"/proc/{pid}")
        assert_hidden((process / "cmdline").read_text() + (process / "environ").read_text())
    assert run.finish()[0] == 0


@needs_gst
def test_what_gstreamer_says_of_a_pipeline() -> None:
    """Its own messages quote what was given."""
    events: list[dict[str, Any]] = []
    source = parse_source("gst:fakesrc num-buffers=t0keN ! fakesink dump=hUntEr2")
    with Capture(source, 8, 3, Status(source.shown, events.append)):
        deadline = time.monotonic() + 30
        while not any(event["state"] == "lost" for event in events) and time.monotonic() < deadline:
            time.sleep(0.02)
    reason = next(event["reason"] for event in events if event["state"] == "lost")
    assert "could not set property" in reason
    assert_hidden(json.dumps(events))
