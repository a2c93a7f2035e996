"""Where records and overlays go: nothing that is read is overwritten, and nothing that was written is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.camera.conftest import lines, records_of
from tests.commands import assert_refused, call, snapshot
from tests.mounts import in_mount, needs_mounts

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """a.png, and a hundred more."""
    (tmp_path / "album" / "below").mkdir(parents=True)
    Image.new("RGB", (40, 30), (90, 120, 150)).save(tmp_path / "album" / "a.png")
    for number in range(100):
        os.link(tmp_path / "album" / "a.png", tmp_path / "album" / "below" / f"{number}.png")
    return tmp_path / "album"


READ, OURS = "is what is read", "is in the bundle"


@pytest.mark.parametrize(
    ("source", "option", "output", "said"),
    [
        ("album/a.png", "--output", "link", READ),
        ("album", "--output", "album/a.png", READ),
        ("album", "--output", "bundle/new/lines.jsonl", OURS),
        ("copy.mp4", "--output", "copy.mp4", READ),
        ("copy.mp4", "--overlay", "copy.mp4", READ),
        ("test", "--output", "bundle/manifest.json", OURS),
        ("copy.mp4", "--overlay", "a.txt", "is no video's name"),
        ("album", "--overlay", "o.mp4", "--overlay cannot be combined"),
        ("film.mp4", "--overlay", "o.mp4", "film.mp4 does not exist"),
        ("test", "--metrics", "x", "The port of x is x"),
    ],
)
def test_what_is_refused_changes_nothing(
    source: str, option: str, output: str, said: str, album: Path, cells: Path, video: Path, tmp_path: Path,
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(cells, tmp_path / "bundle")
    shutil.copy(video, tmp_path / "copy.mp4")
    (tmp_path / "link").symlink_to(album / "a.png")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert_refused(call(capsys, "run", "bundle", "--source", source, option, output), said)
    assert snapshot(tmp_path) == before


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
    assert 10 < len(lines(output.read_text())) < 3000


@needs_mounts
def test_a_service_goes_on_without_the_overlay_of_a_full_disk(cells: Path, tmp_path: Path) -> None:
    run = ("run", cells, "--source", "test:50", "--frames", "300", "--overlay", "disk/o.mp4")
    outcome, _ = in_mount(tmp_path, 64, "true", *run)
    records, events = records_of(outcome), lines(outcome.err)
    (lost,) = [event for event in events if event["event"] == "overlay_lost"]
    assert "No space left on device" in lost["reason"]
    assert events[-1]["overlay_errors"] == 1
    assert records[-1]["monotonic_s"] > lost["monotonic_s"]
