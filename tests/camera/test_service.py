"""`sparsifiner-edge run` as a service: sources, records, overlay, metrics."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.camera.cells import make_cells_bundle, number_of
from tests.camera.conftest import encode
from tests.commands import assert_refused, process
from tests.tiny import make_bundle

needs_gst = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")
TIMES = ("capture_ms", "preprocess_ms", "wait_ms", "infer_ms", "postprocess_ms", "end_to_end_ms")


def records_of(outcome: Any) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def events_of(outcome: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.err.splitlines()]


def numbers_of(records: list[dict[str, Any]]) -> list[int | None]:
    return [number_of(record["features"]) for record in records]


# Sources.


def test_every_frame_of_a_file(cells: Path, video: Path) -> None:
    outcome = process("run", cells, "--source", video)
    records = records_of(outcome)
    assert numbers_of(records) == list(range(30))
    assert [record["pts_s"] for record in records] == pytest.approx([n / 10 for n in range(30)])
    for record in records:
        assert all(record[name] >= 0 for name in TIMES)
        assert record["end_to_end_ms"] >= record["infer_ms"]
        assert "frame_age_ms" not in record
    assert [e.get("state") for e in events_of(outcome)] == [None, None, "connecting", "streaming", "ended", None]
    assert (events_of(outcome)[-1]["captured"], events_of(outcome)[-1]["dropped"]) == (30, 0)


def test_a_live_source_gives_numbers_and_ages(cells: Path) -> None:
    outcome = process("run", cells, "--source", "test:50", "--frames", 40)
    records = records_of(outcome)
    numbers = numbers_of(records)
    assert None not in numbers
    assert numbers == sorted(set(numbers))  # type: ignore[type-var]
    for before, after in itertools.pairwise(records):
        step = (number_of(after["features"]) or 0) - (number_of(before["features"]) or 0)
        assert step >= 1 + after["skipped"]
    assert statistics.median(r["frame_age_ms"] for r in records) < 40
    assert records[5]["change"] >= 0


@pytest.mark.everything
def test_a_model_slower_than_its_source(tmp_path: Path) -> None:
    """Age of a frame: at most a period until it is taken, and the inference; besides what preparing it takes."""
    bundle = make_cells_bundle(tmp_path / "b", size=64, work=4)
    outcome = process("run", bundle, "--source", "test:60", "--frames", 40, "--threads", 1)
    records, done = records_of(outcome), events_of(outcome)[-1]
    assert statistics.median(r["infer_ms"] for r in records) > 1000 / 60
    excess = [
        r["frame_age_ms"] - 1000 / 60 - r["infer_ms"] - r["preprocess_ms"] - r["postprocess_ms"] for r in records[1:]
    ]
    # A quarter even where the decoder must wait for the same core; and a queue would add an inference to all.
    assert statistics.quantiles(excess, n=4)[0] < 1, excess
    assert statistics.median(excess) < statistics.median(r["infer_ms"] for r in records) / 2, excess
    assert done["dropped"] > 10
    assert done["processed"] + done["dropped"] <= done["captured"] <= done["processed"] + done["dropped"] + 2
    assert done["dropped"] >= sum(r["skipped"] for r in records)


def test_a_classifier(tiny_bundle: Path, video: Path) -> None:
    records = records_of(process("run", tiny_bundle, "--source", video, "--frames", 3, "--top", 2))
    assert len(records) == 3
    for record in records:
        assert [set(top) for top in record["top"]] == [{"class", "label", "probability"}] * 2
        assert "features" not in record
        assert "change" not in record
    (record,) = records_of(process("run", tiny_bundle, "--source", video, "--frames", 1, "--threshold", 1))
    assert record["top"] == []


@needs_gst
def test_any_pipeline(cells: Path, video: Path) -> None:
    outcome = process("run", cells, "--source", f"gst:filesrc location={video} ! decodebin", "--frames", 5)
    assert None not in numbers_of(records_of(outcome))


WIDE = {"size": [32, 64], "resize": "centre rectangle, bicubic"}


@pytest.mark.parametrize("source", ["image", "video", pytest.param("pipeline", marks=needs_gst)])
def test_a_rectangle_sees_the_centre_in_its_shape(source: str, tmp_path: Path) -> None:
    """Of 320 x 240 pixels the middle 160 rows; as a square, or made narrower, blue would be in it."""
    from PIL import Image

    bundle = make_bundle(tmp_path / "b", size=(32, 64), preprocessing=WIDE)
    frame = np.full((240, 320, 3), (0, 0, 255), np.uint8)
    frame[30:210] = (255, 0, 0)
    video = encode(tmp_path / "v.mp4", [frame] * 3)
    for name, pixels in (("image", frame), ("red", np.full((10, 10, 3), (255, 0, 0), np.uint8))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    sources = {"image": tmp_path / "image.png", "video": video, "pipeline": f"gst:filesrc location={video} ! decodebin"}
    options = [] if source == "image" else ["--frames", 1]
    record, *_ = records_of(process("run", bundle, "--source", sources[source], *options))
    (expected,) = records_of(process("run", bundle, "--source", tmp_path / "red.png"))
    np.testing.assert_allclose(record["features"], expected["features"], atol=0.05 * np.ptp(expected["features"]))


@needs_gst
@pytest.mark.parametrize("size", [30, 31])
def test_rows_of_any_length_from_a_pipeline(size: int, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", size=size, preprocessing={"size": size})
    red = "gst:videotestsrc is-live=true pattern=red ! video/x-raw,format=RGB,width=320,height=200"
    (record,) = records_of(process("run", bundle, "--source", red, "--frames", 1))
    flat = tmp_path / "red.png"
    from PIL import Image

    Image.new("RGB", (size, size), (255, 0, 0)).save(flat)
    (expected,) = records_of(process("run", bundle, "--source", flat))
    np.testing.assert_allclose(record["features"], expected["features"], rtol=0.05)


@needs_gst
def test_a_pipeline_that_fails_is_tried_again(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "gst:nosuchelement")
    assert "nosuchelement" in run.event(state="lost")["reason"]
    run.event(state="lost", attempt=2)
    assert run.finish()[0] == 0


def test_a_camera_that_is_not_there(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "rtsp://me:secret@127.0.0.1:1/x")
    assert run.event(state="lost")["reason"] == "Connection refused"
    event = run.event(state="lost", attempt=3)
    assert event["source"] == "rtsp://127.0.0.1:1"
    assert run.finish()[0] == 0


# Where it goes.


def test_records_in_a_file(cells: Path, video: Path, tmp_path: Path) -> None:
    lines = tmp_path / "new" / "lines.jsonl"
    outcome = process("run", cells, "--source", video, "--output", lines)
    assert (outcome.code, outcome.out) == (0, "")
    assert numbers_of([json.loads(line) for line in lines.read_text().splitlines()]) == list(range(30))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_an_overlay(suffix: str, cells: Path, video: Path, tmp_path: Path) -> None:
    path = tmp_path / f"overlay{suffix}"
    records_of(process("run", cells, "--source", video, "--overlay", path))
    with av.open(str(path)) as drawn:
        times = [float(frame.time or 0) for frame in drawn.decode(video=0)]
    assert times == pytest.approx([n / 10 for n in range(30)], abs=0.001)


def test_overlays_that_are_refused(cells: Path, video: Path, tmp_path: Path, pictures: Path) -> None:
    copy = Path(shutil.copy(video, tmp_path / "copy.mp4"))
    before = copy.read_bytes()
    assert_refused(process("run", cells, "--source", copy, "--overlay", copy), "is what is read")
    assert copy.read_bytes() == before
    assert_refused(process("run", cells, "--source", copy, "--overlay", tmp_path / "a.txt"), "is no video's name")
    assert_refused(
        process("run", cells, "--source", pictures, "--overlay", tmp_path / "a.mp4"), "--overlay cannot be combined"
    )


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_and_health(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test", "--metrics", "0", "--stall", 1)
    address = run.event(event="metrics")["address"]
    assert address.startswith("http://127.0.0.1:")
    for _ in range(10):
        run.record()
    code, text = get(address)
    assert code == 200
    values = dict(re.findall(r"^(sparsifiner_\S+) (\S+)$", text, re.MULTILINE))
    assert float(values["sparsifiner_processed_total"]) >= 10
    assert float(values['sparsifiner_state{state="streaming"}']) == 1
    assert float(values['sparsifiner_state{state="lost"}']) == 0
    assert float(values["sparsifiner_infer_seconds_count"]) >= 10
    assert float(values["sparsifiner_frame_age_seconds_sum"]) > 0
    assert 'sparsifiner_infer_seconds_bucket{le="+Inf"}' in text
    health = address.replace("/metrics", "/healthz")
    code, text = get(health)
    assert (code, json.loads(text)["reason"]) == (200, None)
    assert get(address.replace("/metrics", "/"))[0] == 404
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1].split("/")[0]))):
        assert get(health)[0] == 200  # One that says nothing holds nobody up.
    os.kill(run.decoder(), signal.SIGSTOP)
    run.event(state="stalled")
    code, text = get(health)
    assert (code, json.loads(text)["healthy"]) == (503, False)
    assert list(json.loads(text)) == ["healthy", "state", "reason", "silent_s"]
    run.event(state="streaming")
    assert run.finish()[0] == 0


def test_a_client_that_leaves_in_the_middle(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "test", "--metrics", "[::1]:0")
    address = run.event(event="metrics")["address"]
    assert address.startswith("http://[::1]:")
    for _ in range(20):
        with socket.create_connection(("::1", int(re.split("[:/]", address)[-2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert get(address)[0] == 200
    assert run.finish()[0] == 0  # Which also sees that no traceback was printed.


def test_a_port_that_is_taken(cells: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(process("run", cells, "--source", "test", "--metrics", port), "Metrics cannot be served")


def test_systemd_is_told(cells: Path, service: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as system:
        system.bind(str(tmp_path / "notify"))
        system.settimeout(20)
        run = service(cells, "--source", "test", env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        said = [system.recv(100).decode() for _ in range(3)]
        assert said == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        assert run.finish()[0] == 0
        while said[-1] != "STOPPING=1":
            said.append(system.recv(100).decode())


def test_the_unit_for_systemd_names_options_that_exist() -> None:
    file = Path(__file__).parents[2] / "runtime" / "systemd" / "sparsifiner-edge.service"
    unit = file.read_text(encoding="utf-8")
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)", unit, re.MULTILINE)
    assert command is not None
    named = set(re.findall(r"--[a-z]+", command[1]))
    assert {"--source", "--metrics"} <= named
    assert named <= set(re.findall(r"--[a-z]+", process("run", "--help").out))
    if shutil.which("systemd-analyze"):
        found = subprocess.run(
            ["systemd-analyze", "verify", file],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        remarks = [line for line in found.stderr.splitlines() if "sparsifiner" in line]
        assert all("is not executable" in line for line in remarks), remarks
