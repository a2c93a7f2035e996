"""Tests of sources, and that no spelling of a password appears in events, metrics or processes."""

from __future__ import annotations

import shlex
import socket
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera import gstreamer
from sparsifiner_edge.camera.decoder_protocol import Wanted
from sparsifiner_edge.camera.gstreamer import launch_line
from sparsifiner_edge.camera.sources import parse_source, require_decoder
from sparsifiner_edge.errors import ConfigError, MissingExtraError, SparsifinerError
from sparsifiner_edge.fitting import Framing
from tests.camera.conftest import get, needs_gst


@pytest.mark.parametrize(
    ("text", "kind", "live", "shown"),
    [
        ("0", "gst", True, "/dev/video0"),
        ("/dev/video12", "gst", True, "/dev/video12"),
        ("test:50", "test", True, "test"),
        ("rtsp://user:secret@h:554/x?y=1", "rtsp", True, "rtsp://h:554"),
        (
            "gst:videotestsrc pattern=ball ! video/x-raw,width=64 ! identity",
            "gst",
            True,
            "gst:videotestsrc ! *** ! identity",
        ),
        ("gst:rtsp://user:secret@h:554/x?y=1", "gst", True, "rtsp://h:554"),
        ("missing.mp4", "images", False, "missing.mp4"),
    ],
)
def test_sources(text: str, kind: str, live: bool, shown: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text(f"{text}\nmore")
    for given in (text, f"@{tmp_path / 'source'}"):
        source = parse_source(given)
        assert (source.kind, source.live, source.shown) == (kind, live, shown)
    (tmp_path / "source").write_text(f"\n{text}")
    with pytest.raises(ConfigError, match="has no source in its first line"):
        parse_source(f"@{tmp_path / 'source'}")


def test_a_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"\[camera\]"):
        require_decoder(parse_source(str(video)))
    with pytest.raises(ConfigError, match=r"apt-get install gstreamer1\.0-tools"):
        require_decoder(parse_source("0"))
    require_decoder(parse_source("test"))


def test_a_decoder_in_hardware_is_taken_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with a Jetson's GStreamer: `nvvidconv` exists, and `gst-launch-1.0 -v` names the decoder."""
    inspect = tmp_path / "gst-inspect-1.0"
    inspect.write_text(
        '#!/bin/sh\n[ "$2" = nvvidconv ] || { [ "$1" = vaxdec ] && echo "Codec/Decoder/Video/Hardware"; }\n'
    )
    inspect.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    wanted = Wanted(Framing(64))
    for source, there in ((parse_source("gst:rtsp://h/x").location, True), (parse_source("0").location, False)):
        assert ("! nvvidconv ! video/x-raw ! queue" in " ".join(launch_line(source, wanted, 3))) == there
    path, raw = b"/GstPipeline:pipeline0/", b".GstPad:src: caps = video/x-raw"
    for before, name, end, told in (
        (b"nvv4l2decoder:", b"nvv4l2decoder", b"0", "hardware"),
        (b"GstDecodeBin:decodebin0/GstVaXDec:", b"vaxdec", b"0", "hardware"),
        (b"GstDecodeBin:decodebin0/avdec_h264:", b"avdec_h264", b"-0", "software"),
    ):
        line = path + before + name + end + raw + b"(memory:NVMM), format=(string)NV12, width=(int)1920\n"
        found = gstreamer._DECODER.search(line)
        assert found is not None
        assert found[1] == name
        assert gstreamer.describe_decoder(name.decode()) == f"{name.decode()} of GStreamer, {told}"
    assert not gstreamer._DECODER.search(path + b"GstDecodeBin:decodebin0.GstDecodePad:src_0" + raw[11:])


def test_a_pad_that_is_told_of_twice_stands_for_the_other() -> None:
    """`gst-launch-1.0` 1.26 sometimes reports our queue's sink twice and its source never."""
    caps = b": caps = video/x-raw, width=(int)640, height=(int)480, pixel-aspect-ratio=(fraction)2/1\n"
    line = b"/GstPipeline:pipeline0/GstQueue:sparsifiner-frames.GstPad:sink" + caps
    assert list(gstreamer._sizes(iter([line, line]), deque())) == [(1280, 480)] * 2


PARTS = ("hUn", "tEr2", "t0keN")
"""Credentials and a token; no spelling below may reveal one of them."""
SOURCES = [
    "rtsp://t0keN@h/x",
    "rtsp://us@er:hUn:tEr2@h/x",
    "rtsp://user:hUn tEr2@h/x",
    "rtsp://user:hUn%40tEr2@[::1]:554/x",
    "rtsp://h/x?y=1&token=t0keN",
    "rtsps://h:7441/4vYqt0keNBEmkRQ3Gm?enableSrtp",
    'gst:rtspsrc location="rtsp://us er:hUn tEr2@h/x" ! decodebin',
    "gst:rtspsrc user-pw='hUn tEr2' proxy-pw=hUn\\ tEr2 ! decodebin",
    "gst:rtspsrc 'user-pw=hUn!tEr2' ! decodebin",
    'gst:"rtspsrc location=rtsp://user:hUntEr2@h user-pw=\\"hUntEr2 ! decodebin"',
    "gst:udpsrc ! application/x-srtp,srtp-key=(buffer)t0keN,t0keN ! srtpdec ! decodebin",
    # Taken for paths.
    "user:hUntEr2@h/x",
]
UNREADABLE = [
    "rtsp://user:hUn/tEr2@h/x",
    "rtsp:/user:hUntEr2@h/x",
    " rtsp://user:hUntEr2@h/x",
    "rtsp://user:hUntEr2@h:port/x",
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
    if source.kind == "images":  # No decoder mentions it.
        return
    # Nor does a message that quotes the input.
    assert_hidden(source.clean(f"cannot open {source.location}: no"))
    for word in shlex.split(source.location) if source.kind == "gst" else []:
        assert_hidden(source.clean(f'could not set property in element "x0" to "{word.partition("=")[2] or word}".'))


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_source_that_cannot_be_read_shows_none_either(text: str) -> None:
    with pytest.raises(SparsifinerError) as caught:
        parse_source(text)
    assert_hidden(str(caught.value))
    assert_hidden(repr(caught.value.__cause__))


@needs_gst
def test_what_gstreamer_quotes(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "gst:fakesrc num-buffers=t0keN ! fakesink dump=hUntEr2")
    reason = run.event(state="lost")["reason"]
    assert "could not set property" in reason
    assert_hidden(reason + str(run.finish()))


def test_events_metrics_health_and_processes(cells: Path, service: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It never answers, so the decoding process stays.
        port = silent.getsockname()[1]
        (tmp_path / "source").write_text(f"rtsp://user:hUntEr2@127.0.0.1:{port}/x?auth=t0keN\n")
        run = service(cells, "--source", f"@{tmp_path / 'source'}", "--metrics", "0", "--stall", 5)
        address = run.event(event="metrics")["address"]
        for pid in (run.process.pid, run.decoder()):
            process = Path(f"/proc/{pid}")
            assert_hidden((process / "cmdline").read_text() + (process / "environ").read_text())
    assert_hidden(str(run.event(state="lost")))
    assert_hidden(get(address)[1] + get(address.replace("/metrics", "/healthz"))[1])
    code, records, events = run.finish()
    assert (code, records) == (0, [])
    assert_hidden(str(events))
