"""What becomes of a run when its decoding process cannot start, dies at once, or says what it may not."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.camera import capture
from sparsifiner_edge.camera.capture import FIRST_WAIT_S, MOST_WAIT_S, Capture, wait_s
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_waiting_grows_to_a_cap_and_varies() -> None:
    assert wait_s(0) == 0
    assert FIRST_WAIT_S / 2 <= wait_s(1) <= FIRST_WAIT_S
    waits = [wait_s(attempt) for attempt in range(5, 205)]
    assert all(MOST_WAIT_S / 2 <= wait <= MOST_WAIT_S for wait in waits)
    assert len({round(wait, 3) for wait in waits}) > 50


def fake_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A process that does something else in the place of the decoding one."""
    path = tmp_path / "decoder"
    names = "from sparsifiner_edge.camera.decoder_protocol import End, Frame, send\n"
    path.write_text(f"#!{sys.executable}\n{names if 'send' in script else ''}{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(capture, "MOST_WAIT_S", 0.001)


def test_a_decoder_that_crashes_all_night_fills_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decoder(tmp_path, monkeypatch, "raise SystemExit(1)")
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), 8, 3, status):
        wait_until(lambda: status.counts["crashes"] > 17)
    attempts = [event["attempt"] for event in events if event["state"] == "lost"]
    assert attempts == [1, 2, 3, 4, 8, 16]
    assert [event["attempt"] for event in events if event["state"] == "connecting"] == [0, *attempts]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [("End(None)", "the stream ended"), ("End('no route')", "no route"),
     ("Frame(bytes(8 * 8 * 3), -1, 0, 0, 0)", "the decoder sent what is no message: ")],
)  # fmt: skip
def test_no_word_of_a_decoder_ends_a_live_source(
    sent: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_decoder(tmp_path, monkeypatch, f"send(1, {sent})")
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), 8, 3, status) as running:
        wait_until(lambda: len([event for event in events if event["state"] == "lost"]) >= 2)
        assert not running.is_over
    assert str(status.last_reason).startswith(reason)
    assert bool(status.counts["crashes"]) == reason.startswith("the decoder")
