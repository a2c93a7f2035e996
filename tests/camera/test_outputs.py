"""Where records and overlays go: nothing that is read is overwritten, and nothing that was written is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.camera.json_lines import LineWriter, new_lines, open_output
from sparsifiner_edge.camera.overlay import Overlay, require_overlay_path
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.files import umask
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
        ("album/a.png", "album/a.png", "is the source itself"),
        ("album/a.png", "link", "is the source itself"),
        ("album", "album/below/b.png", "is one of the source's images"),
        ("album", "link", "is one of the source's images"),
        ("album", "bundle/model.onnx", "is in the bundle"),
        ("album", "bundle/new/lines.jsonl", "is in the bundle"),
        ("copy.mp4", "bundle/manifest.json", "is in the bundle"),
        ("copy.mp4", "copy.mp4", "is the source itself"),
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


def test_an_overlay_is_not_put_into_a_bundle(cells: Path, video: Path, tmp_path: Path, capsys: Capsys) -> None:
    bundle = Path(shutil.copytree(cells, tmp_path / "bundle"))
    outcome = call(capsys, "run", bundle, "--source", video, "--overlay", bundle / "o.mp4")
    assert_refused(outcome, "is in the bundle")


def test_records_may_lie_beside_the_images(album: Path, cells: Path, capsys: Capsys) -> None:
    for _ in range(2):  # The second time it is there.
        outcome = call(capsys, "run", cells, "--source", album, "--output", album / "lines.jsonl")
        assert (outcome.code, outcome.out) == (0, "")
    assert [Path(record["source"]).name for record in lines_of(album / "lines.jsonl")] == ["a.png", "b.png"]
    assert sorted(p.name for p in album.iterdir()) == ["a.png", "below", "lines.jsonl"]


def test_a_video_that_is_not_there(cells: Path, tmp_path: Path, capsys: Capsys) -> None:
    outcome = call(capsys, "run", cells, "--source", "film.mp4", "--overlay", tmp_path / "o.mp4")
    assert_refused(outcome, "film.mp4 does not exist", "a video file")


def test_a_run_that_is_cut_short_keeps_its_lines(album: Path, cells: Path, service: Any, tmp_path: Path) -> None:
    for number in range(3000):
        os.link(album / "a.png", album / f"more{number}.png")
    output = tmp_path / "out" / "lines.jsonl"
    output.parent.mkdir()
    output.write_text("old\n")
    run = service(cells, "--source", album, "--output", output)
    deadline = time.monotonic() + 60
    while sum(p.stat().st_size for p in output.parent.iterdir()) < 10_000:  # It is written as it comes.
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.process.send_signal(signal.SIGINT)
    _, remarks = run.process.communicate(timeout=20)
    assert run.process.returncode == 130, remarks
    assert output.read_text() == "old\n"
    assert 10 < len(lines_of(tmp_path / "out" / "lines.jsonl.part")) < 3000
    assert len(list(output.parent.iterdir())) == 2


@needs_mounts
def test_a_disk_that_becomes_full_keeps_whole_lines(album: Path, cells: Path, tmp_path: Path) -> None:
    for number in range(100):
        os.link(album / "a.png", album / f"more{number}.png")
    outcome, names = in_mount(
        tmp_path, 16, "echo old > lines", "run", cells, "--source", album, "--output", "disk/lines"
    )
    assert_refused(outcome, "disk/lines cannot be written: No space left on device")
    assert names == ["lines", "lines.part"]


def test_lines_of_a_block_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with contextlib.suppress(ValueError), new_lines(path) as write:
        for number in range(5):
            write({"n": number})
        raise ValueError
    assert [record["n"] for record in lines_of(tmp_path / "lines.part")] == list(range(5))
    assert stat.S_IMODE((tmp_path / "lines.part").stat().st_mode) == 0o666 & ~umask()
    with contextlib.suppress(ValueError), new_lines(tmp_path / "other"):
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["lines.part"]
    with pytest.raises(ArtifactError, match="is a folder"), new_lines(tmp_path):
        pass


# A live source.


def test_a_service_that_is_started_again_goes_on_in_its_file(cells: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    for _ in range(2):
        records_of(process("run", cells, "--source", "test", "--frames", 3, "--output", lines))
    assert [record["frame"] for record in lines_of(lines)] == [0, 1, 2, 0, 1, 2]


def test_a_line_that_a_power_cut_left_half_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before, expected in (("", []), ('{"a": 1}\n', ['{"a": 1}']), ('{"a": 1}\n{"a"', ['{"a": 1}', '{"a"'])):
        path.write_text(before)
        writer = LineWriter(open_output(path, append=True), patient=False)
        writer.write({"b": 2})
        writer.close()
        assert path.read_text().splitlines() == [*expected, '{"b": 2}']


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
        tmp_path, 64, "true", "run", cells, "--source", "test", "--fps", "50", "--frames", "300", "--overlay",
        f"disk/o{suffix}",
    )  # fmt: skip
    records, events = records_of(outcome), lines(outcome.err)
    (lost,) = [event for event in events if event["event"] == "overlay_lost"]
    assert lost["reason"] == "No space left on device"
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


@pytest.mark.parametrize("kind", [av.error.ExternalError, av.error.UndefinedError, av.error.ArgumentError])
def test_no_error_of_an_encoder_ends_a_service(
    kind: type[Exception], cells: Path, tmp_path: Path, capfd: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overlay, "_open_stream", failing(kind(errno.EINVAL, "it will not")))
    outcome = call(capfd, "run", cells, "--source", "test", "--fps", 50, "--frames", 3, "--overlay", tmp_path / "o.mp4")
    assert len(records_of(outcome)) == 3
    assert [e["reason"] for e in lines(outcome.err) if e["event"] == "overlay_lost"] == ["it will not"]


def test_an_overlay_that_cannot_be_finished_costs_no_records(
    cells: Path, video: Path, tmp_path: Path, capfd: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overlay, "close", failing(OSError(errno.ENOSPC, "No space left on device")))
    write = LineWriter._write

    def slowly(writer: LineWriter, handle: int, line: bytes) -> None:
        time.sleep(0.05)
        write(writer, handle, line)

    monkeypatch.setattr(LineWriter, "_write", slowly)
    output = tmp_path / "lines"
    outcome = call(capfd, "run", cells, "--source", video, "--output", output, "--overlay", tmp_path / "o.mp4")
    assert outcome.code == 2
    assert "o.mp4 cannot be written: No space left on device" in outcome.err
    assert len(lines_of(output)) == 30


def failing(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_an_encoder_that_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = Overlay(tmp_path / "o.mp4", 8)
    overlay.write(np.zeros((64, 64, 3), np.uint8), ["text"], None, 0.0)

    class Stream:
        encode = staticmethod(failing(av.error.ExternalError(errno.EIO, "it broke")))

    monkeypatch.setattr(overlay, "_stream", Stream())
    with pytest.raises(OSError, match="it broke"):
        overlay.close()
    overlay.abandon()


@pytest.mark.parametrize(("size", "first", "last"), [((30, 60), 16, 47), (224, 0, 63)])
def test_what_the_model_sees_is_outlined(size: Any, first: int, last: int, tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "o.mp4", size)
    overlay.write(np.zeros((64, 64, 3), np.uint8), [], np.ones((3, 6)), 0.0)
    overlay.close()
    with av.open(str(tmp_path / "o.mp4")) as file:
        (frame,) = (frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0))
    green, red = frame[:, 40, 1], frame[:, 40, 0]
    assert [row for row in range(10, 64) if green[row] > 100] == [row for row in (first, last) if row >= 10]
    inside = slice(first + 4, last - 3)
    assert red[inside].min() > 100  # All of it changed.
    assert red[10 : max(first - 3, 10)].max(initial=0) < 60
    assert red[last + 4 :].max(initial=0) < 60


def test_an_ffmpeg_without_the_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    with pytest.raises(ConfigError, match="has no libx264") as caught:
        require_overlay_path(tmp_path / "o.mp4")
    assert "pip install" in caught.value.fix
