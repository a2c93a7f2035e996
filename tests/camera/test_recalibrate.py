"""A bundle fitted to what a video or a camera shows: which frames count, and what ends a camera's."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsifiner_edge as se
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.camera import recalibrate
from sparsifiner_edge.camera.recalibrate import _frames, _rows
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.novelty import LEAST_IMAGES, NOVELTY
from sparsifiner_edge.runtime import open_session
from tests.camera.cells import number_of
from tests.camera.conftest import encode
from tests.commands import PROGRAM, assert_refused, call, handlers_kept
from tests.novel import drawn, novel_bundle
from tests.once import Once

pytestmark = pytest.mark.everything


@pytest.fixture(scope="module")
def novel(once: Once, tiny_weights: Path) -> Path:
    return novel_bundle(once, tiny_weights)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 19, 20, 21, 137, 1000])
def test_frames_lie_evenly_over_whatever_comes(count: int) -> None:
    looked_at: list[int] = []

    def row_of(number: int) -> Any:
        looked_at.append(number)
        return np.array([number])

    rows, ended = _rows(iter(range(count)), 10, row_of)
    numbers = [int(row[0]) for row in rows]
    assert len(numbers) == min(count, 10)
    assert numbers == sorted(set(numbers))
    assert ended is None
    gaps = np.diff([*numbers, count])
    assert gaps.size == 0 or gaps.max() <= 3 * gaps.min()
    assert len(looked_at) <= 20 + 10 * max(0, np.log2(max(1, count) / 20)) + 1, "few of a long video are looked at"


def test_a_video_counts_to_its_end(novel: Path, tmp_path: Path, capsys: Any) -> None:
    """Of a day the night too: what only the last half shows is usual afterwards."""
    nights = [drawn(number, cells=40, low=0, high=255) for number in range(30)]
    video = encode(tmp_path / "day.mp4", [drawn(number) for number in range(30)] + nights)
    with open_session(novel) as session:
        assert session.infer({"image": nights[0][None]})[NOVELTY] > 1
    done = call(capsys, "bundle", "recalibrate", novel, "--source", video, "--frames", 20, "-o", tmp_path / "made")
    assert done.code == 0, done.err
    assert "novelty fitted to 20 frames" in done.out
    assert done.err == ""
    with open_session(tmp_path / "made") as session:
        assert all(session.infer({"image": image[None]})[NOVELTY] < 1 for image in nights)
    done = call(capsys, "bundle", "recalibrate", novel, "--source", video, "--every", 1, "-o", tmp_path / "other")
    assert_refused(done, "is not live: its frames are evenly taken. Leave --every out.")
    with pytest.raises(ConfigError, match="every_s is nan"):
        se.recalibrate_bundle(novel, "test", tmp_path / "other", every_s=float("nan"))


def test_so_much_time_lies_between_frames_of_a_camera(cells: Path) -> None:
    def numbers_at(every_s: float) -> list[int]:
        found = list(_frames(open_bundle(cells), parse_source("test"), 4, every_s))
        numbers = [number_of(image.reshape(8, 8, 8, 8, 3).mean((1, 3, 4)).ravel().tolist()) for image in found]
        return [number for number in numbers if number is not None]

    spread = numbers_at(0.4)
    assert len(spread) == 4
    assert min(np.diff(spread)) >= 10  # Of 25 a second.
    assert len(numbers_at(0)) == 4


def while_frames_come(folder: Path, novel: Path, act: Callable[[], object], at: int) -> Path:
    """Recalibrate by the source `test`, and do something when so many frames came."""
    done = []

    def progress(_stage: str, count: float, _total: float) -> None:
        if count == at:
            done.append(act())

    with handlers_kept():
        made = se.recalibrate_bundle(novel, "test", folder, frames=100_000, progress=progress)
    assert len(done) == 1
    return made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_camera_that_goes_on(number: int, novel: Path, tmp_path: Path) -> None:
    made = while_frames_come(tmp_path / "made", novel, lambda: os.kill(os.getpid(), number), 12)
    fit = open_bundle(made).manifest.novelty
    assert fit is not None
    assert 12 <= fit.images <= 13
    assert fit.ended is None


def test_a_signal_that_comes_too_early(novel: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 images are too few"):
        while_frames_come(tmp_path / "made", novel, lambda: os.kill(os.getpid(), signal.SIGINT), 3)
    assert not (tmp_path / "made").exists()


def decoder_of(pid: int) -> int | None:
    """The decoding process."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return next((int(child) for path in children for child in path.read_text().split()), None)


def wait_for_frames(pid: int, count: int) -> int:
    """Until the decoding process of a process has sent so many; its id."""
    sent, decoder, until = 0, 0, time.monotonic() + 120
    while sent < count * 160 * 160 * 3 and time.monotonic() < until:
        time.sleep(0.1)
        decoder = decoder_of(pid) or 0
        if decoder:
            sent = int(Path(f"/proc/{decoder}/io").read_text().split("wchar: ")[1].split()[0])
    assert decoder
    return decoder


def test_ctrl_c_on_the_command_line(novel: Path, tmp_path: Path) -> None:
    line = [*PROGRAM, "bundle", "recalibrate", str(novel), "--source", "test", "-o", str(tmp_path / "made")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_frames(process.pid, 60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "novelty fitted to" in out
    fit = open_bundle(tmp_path / "made").manifest.novelty
    assert fit is not None
    assert LEAST_IMAGES <= fit.images < 1000


def test_a_camera_that_falls_silent(
    novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recalibrate, "_SILENT_S", 5.0)
    monkeypatch.setattr(recalibrate, "STALL_S", 60.0)  # The decoder is not started anew meanwhile.
    stopper = threading.Thread(target=lambda: os.kill(wait_for_frames(os.getpid(), 60), signal.SIGSTOP))
    stopper.start()
    done = call(capsys, "bundle", "recalibrate", novel, "--source", "test", "-o", tmp_path / "made")
    stopper.join()
    assert done.code == 0
    assert done.err == "The source ended early: no frame came for 5 s.\n"
    fit = open_bundle(tmp_path / "made").manifest.novelty
    assert fit is not None
    assert f"novelty fitted to {fit.images} frames" in done.out
    assert LEAST_IMAGES <= fit.images < 1000


def test_a_camera_that_falls_silent_at_once(novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalibrate, "_SILENT_S", 5.0)
    monkeypatch.setattr(recalibrate, "STALL_S", 60.0)

    def stop() -> None:
        os.kill(wait_for_frames(os.getpid(), 2), signal.SIGSTOP)

    with pytest.raises(ImageError, match="test gave no frame for 5 s"):
        while_frames_come(tmp_path / "few", novel, stop, 2)
    assert not (tmp_path / "few").exists()
