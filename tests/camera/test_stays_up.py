"""`sparsifiner-edge run` stays up: decoders that hang or crash, readers that do not read, disks that fill, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sparsifiner_edge.camera.pattern import draw_pattern
from tests.camera.conftest import encode
from tests.camera.test_service import get, numbers_of, records_of
from tests.commands import PROGRAM, process
from tests.mounts import mounts_allowed

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


def test_a_decoder_that_crashes_is_replaced(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test")
    for _ in range(2):
        run.record()
        os.kill(run.decoder(), signal.SIGSEGV)
        assert run.event(state="lost")["reason"] == "the decoder crashed"
        run.event(state="streaming")
    code, _, events = run.finish()
    assert (code, events[-1]["crashes"], events[-1]["reconnects"]) == (0, 2, 2)


def test_no_decoder_outlives_the_service(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test")
    run.record()
    decoder = run.decoder()
    run.process.kill()
    run.process.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{decoder}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{decoder}").exists()


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
    done = json.loads(err.splitlines()[-1])
    assert done["event"] == "done"
    assert len([json.loads(line) for line in out.splitlines()]) + 5 == done["processed"]
    with av.open(str(overlay)) as file:
        assert len(list(file.decode(video=0))) == done["processed"]


def test_a_signal_while_there_is_no_camera(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "rtsp://127.0.0.1:1/x")
    run.event(state="lost")
    assert run.finish()[0] == 0


def test_a_reader_that_stops_reading_does_not_stop_the_service(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test:200", "--metrics", "0")
    address = run.event(event="metrics")["address"]
    run.record()
    time.sleep(3)
    values = dict(re.findall(r"^(sparsifiner_\S+) (\S+)$", get(address)[1], re.MULTILINE))
    assert float(values["sparsifiner_lines_dropped_total"]) > 10
    before = float(values["sparsifiner_processed_total"])
    time.sleep(0.5)
    values = dict(re.findall(r"^(sparsifiner_\S+) (\S+)$", get(address)[1], re.MULTILINE))
    assert float(values["sparsifiner_processed_total"]) > before
    run.process.terminate()  # While its output is full: nobody reads for a while.
    time.sleep(1)
    out, _ = run.process.communicate(timeout=20)
    assert run.process.returncode == 0
    # The last line may be cut where nobody read on in time; none before it.
    assert all(json.loads(line)["frame"] >= 0 for line in out.splitlines()[:-1])


def test_a_signal_ends_a_file_whose_reader_does_not_read(cells: Path, service: Any, tmp_path: Path) -> None:
    path = encode(tmp_path / "long.mp4", [draw_pattern(n, 64, 64) for n in range(400)])
    run = service(cells, "--source", path)
    run.event(state="streaming")
    time.sleep(1)
    run.process.terminate()
    assert run.process.wait(10) == 0


def test_a_reader_that_leaves_a_service(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test")
    run.record()
    run.process.stdout.close()
    assert run.process.wait(20) == 141
    assert "Traceback" not in run.process.stderr.read()


def test_a_reader_of_the_events_that_leaves(cells: Path, service: Any) -> None:
    """Who reads the records goes on; events have nowhere to go."""
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
    run.process.terminate()
    run.process.stdout.read()
    assert run.process.wait(20) == 0
    limit.cancel()


@pytest.mark.skipif(not mounts_allowed(), reason="this user may not mount a small disk")
def test_a_disk_that_is_full_for_a_while(cells: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=64k none disk || exit 99; dd if=/dev/zero of=disk/fill bs=1k count=44 2> /dev/null\n"
        '"$@" & run=$!; sleep 4; rm disk/fill; wait $run; code=$?; cp disk/lines kept; exit $code'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, "run", cells, "--source", "test:20",
         "--frames", "120", "--output", "disk/lines"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [e["event"] for e in events if "output" in e["event"]][:1] == ["output_failing"]
    assert events[-1]["output_errors"] > 0
    lines = [json.loads(line) for line in (tmp_path / "kept").read_text().splitlines()]
    assert len(lines) + events[-1]["output_errors"] + events[-1]["lines_dropped"] == events[-1]["processed"]
    assert lines[-1]["frame"] > len(lines)  # It went on when there was room again.


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


def test_damage_in_the_middle_costs_frames_alone(cells: Path, tmp_path: Path) -> None:
    path = encode(tmp_path / "v.ts", [draw_pattern(n, 320, 240) for n in range(60)])
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(0)
    for place in noise.integers(len(data) // 4, len(data) // 2, 200):
        data[place] = noise.integers(256)
    path.write_bytes(data)
    found = numbers_of(records_of(process("run", cells, "--source", path)))
    assert found[:10] == list(range(10))
    assert found[-20:] == list(range(40, 60))
