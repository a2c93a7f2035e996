"""`sparsifiner-edge run` stays up: decoders that hang or crash, readers that do not read, disks that fill, signals."""

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

from sparsifiner_edge.camera.pattern import draw_pattern
from tests.camera.conftest import encode, lines, metric, numbers_of, records_of
from tests.commands import PROGRAM, process
from tests.mounts import needs_mounts

pytestmark = pytest.mark.everything


def test_a_decoder_that_hangs_is_ended(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test", "--stall", 0.7)
    run.record()
    hung = run.decoder()
    os.kill(hung, signal.SIGSTOP)
    since = time.monotonic()
    assert "decoder was ended" in run.event(state="stalled")["reason"]
    assert run.event(state="streaming")["lost_s"] < 8
    assert time.monotonic() - since < 10
    assert not Path(f"/proc/{hung}").exists()
    code, _, events = run.finish()
    assert (code, events[-1]["stalls"], events[-1]["reconnects"]) == (0, 1, 1)


def test_a_decoder_that_crashes_is_replaced_and_none_outlives_the_service(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test", "--metrics", 0)
    address = run.event(event="metrics")["address"]
    for number in range(2):
        run.record()
        os.kill(run.decoder(), signal.SIGSEGV)
        assert run.event(state="lost")["reason"] == "the decoder crashed"
        run.event(state="streaming")
        assert (metric(address, "crashes_total"), metric(address, "reconnects_total")) == (number + 1, number + 1)
    decoder, deadline = run.decoder(), time.monotonic() + 5
    run.process.kill()
    run.process.wait()
    while Path(f"/proc/{decoder}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
    # The last line may be cut where nobody read on in time; none before it.
    assert all(json.loads(line)["frame"] >= 0 for line in out.splitlines()[:-1])


def test_a_reader_of_the_events_that_leaves(cells: Path, service: Any) -> None:
    """Who reads the records goes on, until that one leaves as well."""
    run = service(cells, "--source", "test")
    limit = threading.Timer(120, run.process.kill)
    limit.start()
    last = run.record()
    run.process.stderr.close()
    for _ in range(2):
        os.kill(run.decoder(), signal.SIGKILL)
        killed = time.monotonic()
        while last["monotonic_s"] < killed + 0.5:  # Long after those that were on their way.
            last = run.record()
    run.process.stdout.close()
    assert run.process.wait(20) == 141
    limit.cancel()


@needs_mounts
def test_a_disk_that_is_full_for_a_while(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=64k none disk || exit 99; dd if=/dev/zero of=disk/fill bs=1k count=44 2> /dev/null\n"
        '"$@" & run=$!; sleep 4; rm disk/fill; wait $run; code=$?; cp disk/lines kept; exit $code'
    )
    line = [*PROGRAM, "run", cells, "--source", "test:20", "--frames", "120", "--output", "disk/lines"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *line], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    events, kept = lines(done.stderr), lines((tmp_path / "kept").read_text())
    assert [e["event"] for e in events if "output" in e["event"]][:1] == ["output_failing"]
    assert events[-1]["output_errors"] > 0
    assert len(kept) + events[-1]["output_errors"] + events[-1]["lines_dropped"] == events[-1]["processed"]
    assert kept[-1]["frame"] > len(kept)  # It went on when there was room again.


def test_a_resolution_that_changes_in_the_middle(cells: Path, tmp_path: Path) -> None:
    sizes = ((320, 240), (640, 360), (160, 160))
    parts = [
        encode(tmp_path / f"{w}.ts", [draw_pattern(10 * n + i, w, h) for i in range(10)])
        for n, (w, h) in enumerate(sizes)
    ]
    whole = tmp_path / "whole.ts"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    overlay = tmp_path / "o.mp4"
    found = numbers_of(records_of(process("run", cells, "--source", whole, "--overlay", overlay)))
    assert found == list(range(30))
    with av.open(str(overlay)) as file:
        assert {(f.width, f.height) for f in file.decode(video=0)} == {(512, 512)}
