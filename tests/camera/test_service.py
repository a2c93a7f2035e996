"""Tests of `sparsifiner-edge run` as a service: sources, records, overlay, systemd; every line is JSON."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
from PIL import Image

from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.camera.json_lines import line_of
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.service import RunOptions, run_bundle
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.fitting import Framing
from tests.camera.conftest import encode, lines, make_cells_bundle, needs_gst, numbers_of, records_of
from tests.commands import assert_refused, call, process, snapshot
from tests.seal import reseal
from tests.tiny import make_bundle

TIMES = ("capture_ms", "preprocess_ms", "queued_ms", "infer_ms", "postprocess_ms", "end_to_end_ms")


def test_every_frame_of_a_file(cells: Path, video: Path, tmp_path: Path) -> None:
    """Records go to a file in a new folder, with an overlay."""
    output, overlay = tmp_path / "new" / "lines.jsonl", tmp_path / "o.mkv"
    outcome = process("run", cells, "--source", video, "--output", output, "--overlay", overlay)
    assert (outcome.code, outcome.out) == (0, "")
    records, events = lines(output.read_text()), lines(outcome.err)
    assert numbers_of(records) == list(range(30))
    assert [record["pts_s"] for record in records] == pytest.approx([n / 10 for n in range(30)])
    for record in records:
        assert all(record[name] >= 0 for name in TIMES)
        parts = ("capture_ms", "preprocess_ms", "infer_ms", "postprocess_ms")
        assert record["end_to_end_ms"] == pytest.approx(sum(record[name] for name in parts), abs=0.01)
        assert "frame_age_ms" not in record
    assert [event.get("state") for event in events] == [None, None, "connecting", "streaming", None, "ended", None]
    (frames,) = [event for event in events if event["event"] == "frames"]
    assert (frames["size"], frames["box"]) == ([320, 240], [40, 0, 240, 240])
    assert all(record["box"] == frames["box"] for record in records)
    assert "64 px: 240x240 of 320x240 pixels are read, 25 % is dropped; to read all, run with --fit" in frames["says"]
    done = events[-1]
    assert (done["captured"], done["processed"], done["dropped"]) == (30, 30, 0)
    assert done["per_s"] == pytest.approx(29 / (records[-1]["monotonic_s"] - records[0]["monotonic_s"]), rel=0.1)
    for name in ("infer", "end_to_end", "queued"):
        values = sorted(record[f"{name}_ms"] for record in records)
        assert done["median_ms"][name] == pytest.approx(statistics.median(values), abs=0.001)
        assert done["p95_ms"][name] == values[28]
    with av.open(str(overlay)) as drawn:
        times = [float(frame.time or 0) for frame in drawn.decode(video=0)]
    assert times == pytest.approx([n / 10 for n in range(30)], abs=0.001)


@pytest.mark.everything
def test_a_resolution_that_changes_in_the_middle(cells: Path, tmp_path: Path) -> None:
    whole, overlay = tmp_path / "whole.ts", tmp_path / "o.mp4"
    for number, (width, height) in enumerate(((320, 240), (640, 360), (160, 160))):
        part = encode(tmp_path / "part.ts", [draw_pattern(10 * number + i, width, height) for i in range(10)])
        with whole.open("ab") as file:
            file.write(part.read_bytes())
    records = records_of(process("run", cells, "--source", whole, "--overlay", overlay))
    assert numbers_of(records) == list(range(30))
    with av.open(str(overlay)) as file:
        assert {(f.width, f.height) for f in file.decode(video=0)} == {(640, 480)}


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
    """Age of a frame: at most one period until it is taken, plus preparation and inference."""
    bundle = make_cells_bundle(tmp_path / "b", work=2048)
    outcome = process("run", bundle, "--source", "test:60", "--frames", 40, "--threads", 1)
    records, done = records_of(outcome), lines(outcome.err)[-1]
    assert statistics.median(r["infer_ms"] for r in records) > 1000 / 60
    excess = [
        r["frame_age_ms"] - 1000 / 60 - r["infer_ms"] - r["preprocess_ms"] - r["postprocess_ms"] for r in records[1:]
    ]
    # Up to a quarter more if the decoder competes for the same core; a queue would add an inference to every frame.
    assert statistics.quantiles(excess, n=4)[0] < 1, excess
    assert statistics.median(excess) < statistics.median(r["infer_ms"] for r in records) / 2, excess
    assert done["dropped"] > 10
    assert done["processed"] + done["dropped"] <= done["captured"] <= done["processed"] + done["dropped"] + 2
    assert done["dropped"] >= sum(r["skipped"] for r in records)


def test_a_classifier(tiny_bundle: Path, video: Path, tmp_path: Path) -> None:
    """Labels are untrusted text."""
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


@pytest.mark.parametrize("output", ["features", "logits"])
def test_what_is_no_number_is_null_and_counted(output: str, pictures: Path, tmp_path: Path) -> None:
    """A bundle whose first channel is always NaN."""
    bundle = make_bundle(tmp_path / "bundle", size=8, preprocessing={"size": 8})
    model = onnx.load(bundle / "model.onnx")
    weights = next(t for t in model.graph.initializer if t.name == "w0")
    values = np.array(onnx.numpy_helper.to_array(weights))
    values[:, 0] = np.nan
    weights.CopyFrom(onnx.numpy_helper.from_array(values, "w0"))
    model.graph.output[0].name = model.graph.node[-1].output[0] = output
    onnx.save(model, bundle / "model.onnx")
    reseal(bundle)
    live = process("run", bundle, "--source", "test", "--frames", 3)
    for record in records_of(live) + records_of(process("run", bundle, "--source", pictures)):
        assert record["not_finite"] == 1
        assert "change" not in record
        if output == "logits":
            assert record["top"] == []
        else:
            assert [feature is None for feature in record["features"]] == [True] + [False] * 7
    assert lines(live.err)[-1]["not_finite"] == 3


@needs_gst
def test_a_rectangle_sees_the_centre_of_a_pipeline_in_its_shape(tmp_path: Path) -> None:
    """The model reads the middle 160 rows of 320 x 240 pixels; as a square, or squeezed, it would see blue."""
    wide = {"size": [32, 63]}  # A pipeline pads rows to four bytes.
    bundle = make_bundle(tmp_path / "b", size=(32, 63), preprocessing=wide)
    frame = np.full((240, 320, 3), (0, 0, 255), np.uint8)
    frame[30:210] = (255, 0, 0)
    Image.new("RGB", (10, 10), (255, 0, 0)).save(tmp_path / "red.png")
    source = f"gst:filesrc location={encode(tmp_path / 'v.mp4', [frame] * 3)} ! decodebin"
    record, *_ = records_of(process("run", bundle, "--source", source, "--frames", 1))
    (expected,) = records_of(process("run", bundle, "--source", tmp_path / "red.png"))
    np.testing.assert_allclose(record["features"], expected["features"], atol=0.05 * np.ptp(expected["features"]))


@needs_gst
def test_what_of_a_pipeline_is_read_is_what_was_asked(cells: Path, tmp_path: Path) -> None:
    """A frame of four colours from left to right, by brightness, on an 8 x 8 grid."""
    frame = np.repeat(np.array([0, 80, 160, 240], np.uint8), 80)[None, :, None].repeat(160, 0).repeat(3, 2)
    source = f"gst:filesrc location={encode(tmp_path / 'v.mp4', [frame] * 3)} ! decodebin"
    narrow = f"{source} ! videoscale ! video/x-raw,width=160,height=160,pixel-aspect-ratio=2/1"
    assert records_of(process("run", cells, "--source", narrow, "--frames", 1))[0]["box"] == [80, 0, 160, 160]
    for options, box, rows, columns, bright in (
        ((), [80, 0, 160, 160], slice(8), slice(1, 3), 80),
        (("--fit", "letterbox"), [0, 0, 320, 160], slice(2, 6), slice(0, 8, 2), [0, 80, 160, 240]),
        (("--region", "240,20,80,120"), [240, 40, 80, 80], slice(8), slice(8), 240),
    ):
        record, *_ = records_of(process("run", cells, "--source", source, *options, "--frames", 1))
        assert record["box"] == box
        np.testing.assert_allclose(np.reshape(record["features"], (8, 8))[rows, columns] - bright, 0, atol=12)


def test_a_region_that_no_frame_has(cells: Path, video: Path, pictures: Path) -> None:
    """For a live source too, which would otherwise be retried."""
    for source, size in (("test", "640x480"), (video, "320x240"), (pictures / "picture1.png", "80x61")):
        outcome = process("run", cells, "--source", source, "--region", "600,400,41,80")
        assert outcome.code == 2
        assert f"region 600,400,41,80 is not within a frame of {size} pixels" in outcome.err
        assert "Traceback" not in outcome.err
    for region, said in (("1,2,3", "Give X,Y,WIDTH,HEIGHT"), ("0,0,0,5", "from 1"), ("-1,0,5,5", "from 0")):
        assert_refused(process("run", cells, "--source", "test", "--region", region), said)
    from_python: Any = "1,2,3,4", [1, 2, 3, 4], 5
    assert [Framing(8, region=region).region for region in from_python[:2]] == [(1, 2, 3, 4)] * 2
    with pytest.raises(ConfigError, match="The region is 5"):
        Framing(8, region=from_python[2])


def test_bars_may_be_told_nobody(cells: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = process("run", cells, "--source", pictures, "--fit", "letterbox").err
    assert "80x60 of 80x60 pixels are read, 25 % of the input is bars; to avoid bars, export with --like VIDEO" in said
    region = Framing(64, "letterbox", (0, 0, 60, 9))
    assert "--like" not in region.describe(region.of(80, 60))
    monkeypatch.setattr(sys.stderr, "write", lambda _text: os.close(-1))  # An OSError.
    assert run_bundle(cells, str(pictures), RunOptions(output=tmp_path / "o.jsonl")).processed == 3


@needs_gst
def test_a_pipeline_that_fails_is_tried_again(cells: Path, service: Any) -> None:
    run = service(cells, "--source", "gst:nosuchelement")
    assert "not confined" in run.event(event="decoding")["missing"][0]
    assert "nosuchelement" in run.event(state="lost")["reason"]
    run.event(state="lost", attempt=2)
    assert run.finish()[0] == 0


def test_only_what_a_key_signed_runs(cells: Path, keys: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """Other rejected signatures: tests/test_signing.py."""
    output, bundle = tmp_path / "lines.jsonl", Path(shutil.copytree(cells, tmp_path / "signed"))
    run = ("run", bundle, "--source", pictures, "--output", output, "--require-signature")
    for key, said in (("key.pub", "is not signed"), ("none.pub", "none.pub"), ("key.pem", "key.pem")):
        assert_refused(call(capsys, *run, keys / key), said)
    sign_bundle(bundle, keys / "key.pem")
    assert_refused(call(capsys, *run, keys / "other.pub"), "signed by another key")
    assert not output.exists()
    assert call(capsys, *run, keys / "key.pub").code == 0
    assert len(lines(output.read_text())) == 3


@pytest.mark.parametrize(
    ("source", "option", "output", "said"),
    [
        ("album/picture0.png", "--output", "link", "is an input"),
        ("album", "--output", "album/picture0.png", "is an input"),
        ("album", "--output", "bundle/new/lines.jsonl", "is in the bundle"),
        ("copy.mp4", "--overlay", "copy.mp4", "is an input"),
        ("test", "--output", "bundle/manifest.json", "is in the bundle"),
        ("copy.mp4", "--overlay", "a.txt", "is not a supported video file"),
        ("album", "--overlay", "o.mp4", "--overlay (option 'overlay') applies only to videos and cameras"),
        ("film.mp4", "--overlay", "o.mp4", "film.mp4 does not exist"),
        ("test", "--metrics", "x", "The port of x is x"),
    ],
)
def test_nothing_that_is_read_is_overwritten(
    source: str,
    option: str,
    output: str,
    said: str,
    pictures: Path,
    cells: Path,
    video: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(cells, tmp_path / "bundle")
    shutil.copytree(pictures, tmp_path / "album")
    shutil.copy(video, tmp_path / "copy.mp4")
    (tmp_path / "link").symlink_to("album/picture0.png")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert_refused(call(capsys, "run", "bundle", "--source", source, option, output), said)
    assert snapshot(tmp_path) == before


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


def test_the_unit_for_systemd_names_options_that_exist(capsys: Any) -> None:
    file = Path(__file__).parents[2] / "runtime" / "systemd" / "sparsifiner-edge.service"
    command = re.search(r"^ExecStart=((?:.*\\\n)*.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert command is not None
    named = set(re.findall(r"--[a-z]+", command[1]))
    assert {"--source", "--metrics"} <= named <= set(re.findall(r"--[a-z]+", call(capsys, "run", "--help").out))
    if shutil.which("systemd-analyze"):
        found = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
        remarks = [line for line in found.stderr.splitlines() if "sparsifiner" in line]
        assert all("is not executable" in line for line in remarks), remarks


def test_numbers_that_are_none_and_hidden_characters() -> None:
    line = line_of({"features": [1.5, float("nan"), -float("inf")], "change": float("inf")})
    assert lines(line.decode()) == [{"features": [1.5, None, None], "change": None, "not_finite": 3}]
    content = {"source": "\u009b2J\u202e\u2028\x1b\udcff\ue000 \u00fc\u4e2d.mp4"}
    line = line_of(content)
    assert line == b'{"source": "\\u009b2J\\u202e\\u2028\\u001b\\udcff\\ue000 ' + '\u00fc\u4e2d.mp4"}\n'.encode()
    assert json.loads(line) == content
