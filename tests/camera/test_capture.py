"""What becomes of a run when its decoding process cannot start, dies at once, or says what it may not."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera import backoff, capture
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.prepare import Fit
from sparsifiner_edge.camera.sources import Source, parse_source
from sparsifiner_edge.camera.status import Status


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_decoder_that_cannot_be_started_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, start = [errno.EAGAIN, errno.ENOMEM], subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        if refusals:
            raise OSError(number := refusals.pop(0), os.strerror(number))
        return start(*arguments, **options)

    monkeypatch.setattr(capture.subprocess, "Popen", popen)
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), Fit(8), 50, 3, status) as running:
        assert running.mailbox.take(60) is not None
    assert status.counts["crashes"] == 2
    reasons = [event["reason"] for event in events if event["state"] == "lost"]
    assert reasons == [f"the decoder cannot be started: {os.strerror(n)}" for n in (errno.EAGAIN, errno.ENOMEM)]


def test_frames_of_a_rectangle() -> None:
    events: list[dict[str, Any]] = []
    with Capture(parse_source("test"), Fit((6, 10), display=64), 50, 3, Status("test", events.append)) as running:
        frame = running.mailbox.take(60)
    assert frame is not None
    assert frame.image.shape == (6, 10, 3)
    assert frame.shown is not None
    assert frame.shown.shape == (48, 64, 3)


@pytest.mark.parametrize("source", ["test", "rtsp://127.0.0.1:1/x"])
def test_a_process_that_runs_out_of_descriptors(source: str) -> None:
    """For the decoder, and for the relay of a camera; it recovers when some are free again."""
    events: list[dict[str, Any]] = []
    status, parsed = Status(source, events.append), parse_source(source)
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with Capture(parsed, Fit(8), 50, 3, status) as running:
            wait_until(lambda: status.counts["crashes"] >= 2)
            while held:
                os.close(held.pop())
            if source == "test":
                assert running.mailbox.take(60) is not None
            else:
                wait_until(lambda: status.last_reason == "Connection refused")
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
    assert events[1]["reason"] == f"the decoder cannot be started: {os.strerror(errno.EMFILE)}"


def test_a_file_whose_decoder_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(capture.subprocess, "Popen", popen)
    with Capture(Source("file", str(tmp_path / "v.mp4"), False, "v.mp4"), Fit(8), 1, 3, Status("x", print)) as running:
        assert running.mailbox.take(60) is None
        wait_until(lambda: running.mailbox.closed)
    assert running.failure == "the decoder cannot be started: Cannot allocate memory"


def fake_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A process that does something else in the place of the decoding one."""
    path = tmp_path / "decoder"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_decoder_that_crashes_all_night_fills_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decoder(tmp_path, monkeypatch, "raise SystemExit(1)")
    monkeypatch.setattr(backoff, "MOST_S", 0.001)
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), Fit(8), 25, 3, status):
        wait_until(lambda: status.counts["crashes"] > 17)
    told = [event["attempt"] for event in events if event["state"] == "lost"]
    assert told == [1, 2, 3, 4, 8, 16]
    assert [event["attempt"] for event in events if event["state"] == "connecting"] == [0, *told]


def test_attempts_of_a_process_count_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tries twice, then crashes."""
    fake_decoder(
        tmp_path,
        monkeypatch,
        "import json, os, sys\n"
        "from sparsifiner_edge.camera.decoder_protocol import StateHeader, send\n"
        "attempt = json.load(sys.stdin)['attempts']\n"
        "for number in (1, 2):\n"
        "    send(1, StateHeader('lost', attempt + number, 'no route'))\n",
    )
    monkeypatch.setattr(backoff, "MOST_S", 0.001)
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), Fit(8), 25, 3, status):
        wait_until(lambda: status.counts["crashes"] == 4)
    told = [event["attempt"] for event in events if event.get("reason") == "no route"]
    assert told == [1, 2, 4, 8]
    assert [event["attempt"] for event in events if event.get("reason") == "the decoder crashed"] == [3]


def test_no_word_of_a_decoder_ends_a_live_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decoder(
        tmp_path,
        monkeypatch,
        "from sparsifiner_edge.camera.decoder_protocol import StateHeader, send\nsend(1, StateHeader('ended'))",
    )
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), Fit(8), 25, 3, status) as running:
        wait_until(lambda: status.counts["crashes"] == 2)
        assert not running.mailbox.closed
    assert status.last_reason == "the decoder sent the end of a live source"


def test_the_mailbox_is_closed_whatever_becomes_of_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(event: dict[str, Any]) -> None:
        raise RuntimeError if event["state"] == "ended" else BrokenPipeError

    monkeypatch.setattr(capture.threading, "excepthook", lambda _: None)
    fake_decoder(
        tmp_path,
        monkeypatch,
        "from sparsifiner_edge.camera.decoder_protocol import StateHeader, send\n"
        "send(1, StateHeader('ended', reason='x'))",
    )
    with Capture(Source("file", "v.mp4", False, "v.mp4"), Fit(8), 1, 3, Status("x", tell)) as running:
        wait_until(lambda: running.mailbox.closed)
    assert running.failure == "x"
