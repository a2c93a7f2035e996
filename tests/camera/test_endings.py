"""Tests of how `sparsifiner-edge run` ends or continues: blocked readers, full disks, signals and complete lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import av
import pytest

from sparsifiner_edge.camera.json_lines import LineWriter
from tests.camera.conftest import lines, metric, records_of
from tests.commands import PROGRAM, process, wait_for
from tests.mounts import in_mount, needs_mounts


def test_a_run_that_is_killed_leaves_its_lines_and_no_lock(cells: Path, service: Any, tmp_path: Path) -> None:
    path, again = tmp_path / "lines", ("run", cells, "--source", "test", "--frames", 3, "--output", tmp_path / "lines")
    run = service(cells, "--source", "test", "--output", path)
    run.event(state="streaming")
    outcome = process(*again)
    assert outcome.code == 2
    assert f"error: {path} is being written by another run" in outcome.err
    run.process.kill()
    run.process.wait()
    before = lines(path.read_text())
    assert process(*again).code == 0
    assert [record["frame"] for record in lines(path.read_text())] == [*range(len(before)), 0, 1, 2]


def test_a_file_that_is_emptied_has_no_hole_and_a_half_line_takes_no_other_with_it(tmp_path: Path) -> None:
    """The file is emptied as by logrotate (copytruncate), and has a partial line as after a power cut."""
    path = tmp_path / "lines"
    for before, expected in (("", []), ('{"a": 1}\n', ['{"a": 1}']), ('{"a": 1}\n{"a"', ['{"a": 1}', '{"a"'])):
        path.write_text(before)
        with LineWriter(path, live=True) as writer:
            writer.write({"b": 2})
            assert path.read_text().splitlines() == [*expected, '{"b": 2}']
            os.truncate(path, 0)
            writer.write({"b": 3})
        assert lines(path.read_text()) == [{"b": 3}]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.everything)])
def test_a_signal_ends_the_run_with_whole_lines(
    number: signal.Signals, cells: Path, service: Any, tmp_path: Path
) -> None:
    overlay = tmp_path / "o.mp4"
    run = service(cells, "--source", "test", "--overlay", overlay)
    for _ in range(5):
        run.record()
    run.process.send_signal(number)
    out, err = run.process.communicate(timeout=20)
    assert run.process.returncode == 0, err
    done = lines(err)[-1]
    assert done["event"] == "done"
    assert len(lines(out)) + 5 == done["processed"]
    with av.open(str(overlay)) as file:
        assert len(list(file.decode(video=0))) == done["processed"]


def test_images_that_are_cut_short_keep_their_lines(pictures: Path, cells: Path, service: Any, tmp_path: Path) -> None:
    album, output = tmp_path / "album", tmp_path / "out" / "lines.jsonl"
    album.mkdir()
    for number in range(3000):
        (album / f"{number}.png").symlink_to(pictures / "picture0.png")
    run = service(cells, "--source", album, "--output", output)
    wait_for(lambda: output.exists() and output.stat().st_size > 10_000)  # It is written as it arrives.
    run.process.send_signal(signal.SIGINT)
    _, remarks = run.process.communicate(timeout=20)
    assert run.process.returncode == 0, remarks
    assert 10 < len(lines(output.read_text())) < 3000


@pytest.mark.everything
def test_a_reader_that_stops_reading_does_not_stop_the_service(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test:200", "--metrics", "0")
    address = run.event(event="metrics")["address"]
    run.record()
    time.sleep(3)
    assert metric(address, "lines_dropped_total") > 10
    before = metric(address, "processed_total")
    time.sleep(0.5)
    assert metric(address, "processed_total") > before
    run.process.terminate()  # While its output is full: nobody reads for a while.
    time.sleep(1)
    out, _ = run.process.communicate(timeout=20)
    assert run.process.returncode == 0
    # The last line may be cut if nobody read on in time, but no line before it.
    assert all(json.loads(line)["frame"] >= 0 for line in out.splitlines()[:-1])


@pytest.mark.everything
def test_a_reader_of_the_events_that_leaves(cells: Path, service: Any) -> None:
    """Records continue until their reader leaves as well."""
    run = service(cells, "--source", "test")
    limit = threading.Timer(120, run.process.kill)
    limit.start()
    last = run.record()
    run.process.stderr.close()
    for _ in range(2):
        os.kill(run.decoder(), signal.SIGKILL)
        killed = time.monotonic()
        while last["monotonic_s"] < killed + 0.5:  # Long after those that were in transit.
            last = run.record()
    run.process.stdout.close()
    assert run.process.wait(20) == 141
    limit.cancel()


@pytest.mark.everything
@needs_mounts
def test_a_disk_that_is_full_for_a_while(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=64k none disk || exit 99; dd if=/dev/zero of=disk/fill bs=1k count=44 2> /dev/null\n"
        '"$@" 2> told & run=$!; until grep -q output_failing told || ! kill -0 $run; do sleep .1; done\n'
        "rm disk/fill; wait $run; code=$?; cp disk/lines kept; exit $code"
    )
    line = [*PROGRAM, "run", cells, "--source", "test:20", "--frames", "60", "--output", "disk/lines"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *line], cwd=tmp_path, check=False)
    remarks = (tmp_path / "told").read_text()
    assert done.returncode == 0, remarks
    events, kept = lines(remarks), lines((tmp_path / "kept").read_text())
    assert [e["event"] for e in events if "output" in e["event"]][:1] == ["output_failing"]
    assert events[-1]["output_errors"] > 0
    assert len(kept) + events[-1]["output_errors"] + events[-1]["lines_dropped"] == events[-1]["processed"]
    assert kept[-1]["frame"] >= len(kept)  # It continued when space was available again.


@needs_mounts
def test_a_service_goes_on_without_the_overlay_of_a_full_disk(cells: Path, tmp_path: Path) -> None:
    run = ("run", cells, "--source", "test:50", "--frames", "300", "--overlay", "disk/o.mp4")
    outcome, _ = in_mount(tmp_path, 64, "true", *run)
    records, events = records_of(outcome), lines(outcome.err)
    (lost,) = [event for event in events if event["event"] == "overlay_lost"]
    assert "No space left on device" in lost["reason"]
    assert events[-1]["overlay_errors"] == 1
    assert records[-1]["monotonic_s"] > lost["monotonic_s"]
