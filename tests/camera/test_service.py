"""`sparsifiner-edge run` as a service: sources, records, overlay, systemd."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import statistics
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.bundle.sign import sign_bundle
from tests.camera.cells import make_cells_bundle
from tests.camera.conftest import encode, lines, needs_gst, numbers_of, records_of
from tests.commands import process
from tests.package.reseal import reseal
from tests.tiny import make_bundle

TIMES = ("capture_ms", "preprocess_ms", "wait_ms", "infer_ms", "postprocess_ms", "end_to_end_ms")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_every_frame_of_a_file(suffix: str, cells: Path, video: Path, tmp_path: Path) -> None:
    """Into a file whose folder is new, with an overlay."""
    output, overlay = tmp_path / "new" / "lines.jsonl", tmp_path / f"o{suffix}"
    outcome = process("run", cells, "--source", video, "--output", output, "--overlay", overlay)
    assert (outcome.code, outcome.out) == (0, "")
    records, events = lines(output.read_text()), lines(outcome.err)
    assert numbers_of(records) == list(range(30))
    assert [record["pts_s"] for record in records] == pytest.approx([n / 10 for n in range(30)])
    for record in records:
        assert all(record[name] >= 0 for name in TIMES)
        assert record["end_to_end_ms"] >= record["infer_ms"]
        assert "frame_age_ms" not in record
    assert [event.get("state") for event in events] == [None, None, "connecting", "streaming", "ended", None]
    assert (events[-1]["captured"], events[-1]["dropped"]) == (30, 0)
    with av.open(str(overlay)) as drawn:
        times = [float(frame.time or 0) for frame in drawn.decode(video=0)]
    assert times == pytest.approx([n / 10 for n in range(30)], abs=0.001)


def test_a_live_source_gives_numbers_and_ages(cells: Path) -> None:
    records = records_of(process("run", cells, "--source", "test:50", "--frames", 40))
    numbers = [number for number in numbers_of(records) if number is not None]
    assert len(numbers) == 40
    for (before, after), record in zip(itertools.pairwise(numbers), records[1:], strict=True):
        assert after - before >= 1 + record["skipped"]
    assert statistics.median(r["frame_age_ms"] for r in records) < 40
    assert records[5]["change"] >= 0


@pytest.mark.everything
def test_a_model_slower_than_its_source(tmp_path: Path) -> None:
    """Age of a frame: at most a period until it is taken, and the inference; besides what preparing it takes."""
    bundle = make_cells_bundle(tmp_path / "b", size=64, work=4)
    outcome = process("run", bundle, "--source", "test:60", "--frames", 40, "--threads", 1)
    records, done = records_of(outcome), lines(outcome.err)[-1]
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


def test_a_classifier(tiny_bundle: Path, video: Path, tmp_path: Path) -> None:
    """Its labels may be anyone's."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / "labels.txt").write_bytes(b"\x1b[2Jred\n../../../etc\n\xff\xfe\n" + b"\xe2\x80\xae\n" * 7)
    reseal(bundle)
    run = ("run", bundle, "--source", video, "--frames", 3, "--top", 10, "--overlay", tmp_path / "o.mp4")
    records = records_of(outcome := process(*run))
    assert len(records) == 3
    for record in records:
        assert [set(top) for top in record["top"]] == [{"class", "label", "probability"}] * 10
        assert {top["label"] for top in record["top"]} >= {"\\x1b[2Jred", "../../../etc"}
        assert not record.keys() & {"features", "change"}
    assert "\x1b" not in outcome.out
    (record,) = records_of(process("run", tiny_bundle, "--source", video, "--frames", 1, "--threshold", 1))
    assert record["top"] == []


@pytest.mark.parametrize("source", ["image", "video", pytest.param("pipeline", marks=needs_gst)])
def test_a_rectangle_sees_the_centre_in_its_shape(source: str, tmp_path: Path) -> None:
    """Of 320 x 240 pixels the middle 160 rows; as a square, or made narrower, blue would be in it."""
    wide = {"size": [32, 63], "resize": "centre rectangle, bicubic"}  # A pipeline pads rows to four bytes.
    bundle = make_bundle(tmp_path / "b", size=(32, 63), preprocessing=wide)
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
def test_pipelines(cells: Path, video: Path, service: Any) -> None:
    """One that ends, and one that fails and is tried again; neither is confined."""
    outcome = process("run", cells, "--source", f"gst:filesrc location={video} ! decodebin", "--frames", 5)
    assert None not in numbers_of(records_of(outcome))
    run = service(cells, "--source", "gst:nosuchelement")
    assert "not confined" in run.event(event="decoding")["missing"][0]
    assert "nosuchelement" in run.event(state="lost")["reason"]
    run.event(state="lost", attempt=2)
    assert run.finish()[0] == 0


def test_only_what_a_key_signed_runs(cells: Path, keys: Path, pictures: Path, tmp_path: Path) -> None:
    """What else a signature refuses: tests/test_signing.py."""
    output, bundle = tmp_path / "lines.jsonl", Path(shutil.copytree(cells, tmp_path / "signed"))
    run = ("run", bundle, "--source", pictures, "--output", output, "--require-signature")
    for key, said in (("key.pub", "is not signed"), ("none.pub", "none.pub"), ("key.pem", "key.pem")):
        outcome = process(*run, keys / key)
        assert (outcome.code, said in outcome.err, output.exists()) == (2, True, False), outcome
    sign_bundle(bundle, keys / "key.pem")
    outcome = process(*run, keys / "other.pub")
    assert (outcome.code, "signed by another key" in outcome.err, output.exists()) == (2, True, False), outcome
    assert process(*run, keys / "key.pub").code == 0
    assert len(lines(output.read_text())) == 3


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
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None
    named = set(re.findall(r"--[a-z]+", command[1]))
    assert {"--source", "--metrics"} <= named
    assert named <= set(re.findall(r"--[a-z]+", process("run", "--help").out))
    if shutil.which("systemd-analyze"):
        found = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
        remarks = [line for line in found.stderr.splitlines() if "sparsifiner" in line]
        assert all("is not executable" in line for line in remarks), remarks
