"""Where records and overlays go: nothing that is read is overwritten, and nothing that was written is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.camera.overlay import Overlay
from sparsifiner_edge.camera.status import Status
from tests.camera.test_after_a_frame import record
from tests.camera.test_service import records_of
from tests.commands import Outcome, assert_refused, call, process, snapshot
from tests.everything import first
from tests.mounts import in_mount, needs_mounts

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """a.png and below/b.png."""
    for name in ("a.png", "below/b.png"):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (90, 120, 150)).save(path)
    return tmp_path / "album"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("source", "output", "said"),
    [
        ("album/a.png", "album/a.png", "is what is read"),
        ("album/a.png", "link", "is what is read"),
        ("album", "album/a.png", "is what is read"),
        ("album", "bundle/model.onnx", "is in the bundle"),
        ("album", "bundle/new/lines.jsonl", "is in the bundle"),
        ("copy.mp4", "bundle/manifest.json", "is in the bundle"),
        ("copy.mp4", "copy.mp4", "is what is read"),
        ("test", "bundle/lines.jsonl", "is in the bundle"),
    ],
)
def test_what_is_read_is_never_overwritten(
    source: str, output: str, said: str, album: Path, cells: Path, video: Path, tmp_path: Path, capsys: Capsys
) -> None:
    shutil.copytree(cells, tmp_path / "bundle")
    shutil.copy(video, tmp_path / "copy.mp4")
    (tmp_path / "link").symlink_to(album / "a.png")
    before = snapshot(tmp_path)
    place = source if source == "test" else tmp_path / source
    outcome = call(capsys, "run", tmp_path / "bundle", "--source", place, "--output", tmp_path / output)
    assert_refused(outcome, f"{tmp_path / output} {said}", "Give the output another")
    assert snapshot(tmp_path) == before


def test_a_video_that_is_not_there(cells: Path, tmp_path: Path, capsys: Capsys) -> None:
    outcome = call(capsys, "run", cells, "--source", "film.mp4", "--overlay", tmp_path / "o.mp4")
    assert_refused(outcome, "film.mp4 does not exist", "a video file")


def test_images_that_are_cut_short_keep_their_lines(album: Path, cells: Path, service: Any, tmp_path: Path) -> None:
    for number in range(3000):
        os.link(album / "a.png", album / f"more{number}.png")
    output = tmp_path / "out" / "lines.jsonl"
    run = service(cells, "--source", album, "--output", output)
    deadline = time.monotonic() + 60
    while not output.exists() or output.stat().st_size < 10_000:  # It is written as it comes.
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    _, remarks = run.process.communicate(timeout=20)
    assert run.process.returncode == 0, remarks
    assert 10 < len(lines_of(output)) < 3000


@needs_mounts
def test_a_disk_that_becomes_full_keeps_whole_lines(album: Path, cells: Path, tmp_path: Path) -> None:
    for number in range(100):
        os.link(album / "a.png", album / f"more{number}.png")
    outcome, names = in_mount(tmp_path, 16, "true", "run", cells, "--source", album, "--output", "disk/lines")
    assert_refused(outcome, "disk/lines cannot be written: No space left on device")
    assert names == ["lines"]


# A live source.


def test_a_service_that_is_started_again_goes_on_in_its_file(cells: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    for _ in range(2):
        records_of(process("run", cells, "--source", "test", "--frames", 3, "--output", lines))
    assert [record["frame"] for record in lines_of(lines)] == [0, 1, 2, 0, 1, 2]


def test_a_file_is_rotated_by_being_copied_and_emptied(cells: Path, service: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    run = service(cells, "--source", "test", "--output", lines)
    deadline = time.monotonic() + 60
    while not lines.exists() or lines.stat().st_size < 3000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.truncate(lines, 0)
    time.sleep(0.5)
    assert run.finish()[0] == 0
    frames = [record["frame"] for record in lines_of(lines)]
    assert frames == list(range(frames[0], frames[-1] + 1))
    assert frames[0] > 0


# The overlay.


@needs_mounts
@pytest.mark.parametrize("suffix", first([".mp4", ".mkv"]))
def test_a_service_goes_on_without_the_overlay_of_a_full_disk(suffix: str, cells: Path, tmp_path: Path) -> None:
    outcome, _ = in_mount(
        tmp_path, 64, "true", "run", cells, "--source", "test:50", "--frames", "300", "--overlay",
        f"disk/o{suffix}",
    )  # fmt: skip
    records, events = records_of(outcome), lines(outcome.err)
    (lost,) = [event for event in events if event["event"] == "overlay_lost"]
    assert "No space left on device" in lost["reason"]
    assert events[-1]["overlay_errors"] == 1
    assert records[-1]["monotonic_s"] > lost["monotonic_s"]


@needs_mounts
def test_the_overlay_of_a_file_on_a_full_disk(cells: Path, video: Path, tmp_path: Path) -> None:
    """The records so far come all the same."""
    outcome, _ = in_mount(
        tmp_path, 64, "dd if=/dev/zero of=fill bs=1k count=60 2> /dev/null", "run", cells, "--source", video,
        "--overlay", "disk/o.mkv",
    )  # fmt: skip
    assert_of_overlay(outcome, "disk/o.mkv cannot be written: No space left on device")


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_of_overlay(outcome: Outcome, said: str) -> None:
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out.endswith("\n")
    assert lines(outcome.out)


def test_what_a_model_sees_and_says_is_drawn(tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "o.mp4", (30, 60), False, Status("x", print))
    heat = np.zeros((2, 4))
    heat[:, 2:] = 1
    with overlay:
        for at_s in (5.0, 5.2):
            overlay.write(np.zeros((30, 60, 3), np.uint8), record(infer_ms=3.0), heat, at_s)
    with av.open(str(tmp_path / "o.mp4")) as file:
        frames = list(file.decode(video=0))
    assert [round(float(frame.time or 0), 3) for frame in frames] == [0, 0.2]
    pixels = frames[0].to_ndarray(format="rgb24").astype(int)
    assert pixels.shape == (240, 480, 3)
    assert pixels[100:, 360:, 0].min() > 100
    assert pixels[100:, :120, 0].max() < 60
    assert pixels[:24, :200].max() > 200  # Text.
