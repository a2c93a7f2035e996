"""Tests of streaming inference on videos: comparison with the dense model, camera rates and long runs."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparsifiner_edge as se
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.metrics import agreement
from tests.commands import process
from tests.test_stream import frames


def test_a_stream_is_evaluated_by_a_video(stream_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra camera is not installed")
    from tests.camera.conftest import encode

    video = encode(tmp_path / "camera.mp4", [frame["image"][0] for frame in frames(12)])
    command = ["evaluate", stream_bundle, "--video", video, "--backend", "onnxruntime"]
    judged = tmp_path / "stream.json"
    shown = process(*command, "-o", judged)
    assert shown.code == 0, shown.err
    assert "hold every 4th" in shown.out
    result = json.loads(judged.read_text())
    assert result["kind"] == "stream"
    assert result["method"]["frames"] == 12
    for way, samples in result["samples"].items():
        assert len(samples["ms"]) == 11, way
        for name, values in samples.items():
            assert result["statistics"][way][name] == pytest.approx(sum(values) / len(values))
    stream, held = (result["statistics"][way] for way in ("stream", "hold every 16th"))
    assert 0.98 < stream["patches"] <= 1
    assert stream["moving"] > held["moving"]  # Held answers are wrong where something moves.
    assert stream["share"] < 0.8  # Each of the first events causes a full frame.
    alone = result["statistics"]["every frame by the model"]
    assert alone["features"] == pytest.approx(result["statistics"]["stream"]["features"], abs=0.05)
    for language in ("en", "ja"):
        report = se.write_report([judged], tmp_path / "page.html", language=language)
        assert report.sections == ["stream", "method"]
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert (page.count("data:image/jpeg;base64,"), page.count("<polygon")) == (2, 2)
        assert f"{stream['patches']:.4f}" in page
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames(9)):
        Image.fromarray(frame["image"][0]).save(folder / f"{number:02d}.png")
    found = se.evaluate_video(stream_bundle, folder, se.RunOptions(share=0.25, execution="onnxruntime"), every=2)
    assert (found.method.frames, set(found.statistics)) == (9, {"stream", "every frame by the model"})
    assert found.statistics["stream"]["share"] == pytest.approx(0.25)
    for wrong, said in (
        ([*command, "--data", folder], "--data"),
        ([*command, "--every", "12"], "frames to compare"),
        ([*command, "--metric", "top1"], "--metric cannot be combined with --video"),
        (["evaluate", stream_bundle, "--data", folder, "--share", "0.5"], "--share requires --video"),
        (["evaluate", tiny_bundle, "--video", video], "--stream"),
        ([*command[:3], "rtsp://127.0.0.1:1/none"], "is a live source"),
        ([*command[:3], folder / "00.txt"], "00.txt"),
    ):
        outcome = process(*wrong)
        assert outcome.code == 2, outcome
        assert said in outcome.err, outcome


def test_a_bundle_is_timed_at_a_cameras_pace(
    stream_bundle: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames(30)):
        Image.fromarray(frame["image"][0]).save(folder / f"{number:02d}.png")
    command = ["profile", stream_bundle, "--video", folder, "--backend", "onnxruntime", "--seconds", "3"]
    shown = process(*command, "--rate", "20", "--deadline", "2000ms", "-o", tmp_path / "pace.json")
    assert shown.code == 0, shown.err
    assert "as a stream" in shown.out
    result = json.loads((tmp_path / "pace.json").read_text())
    figures, samples = result["statistics"], result["samples"]
    assert (figures["frames"], figures["missed"], figures["dropped"]) == (30, 0, 30 - len(samples["age_ms"]))
    assert all(age >= taken - 1 for age, taken in zip(samples["age_ms"], samples["infer_ms"], strict=True))
    assert figures["age_ms"]["p50"] <= figures["age_ms"]["p99"] <= figures["age_ms"]["p99.9"]
    # At a rate that is too high, frames are dropped and the newest is answered.
    infer = Model.infer_frame
    monkeypatch.setattr(Model, "infer_frame", lambda *arguments: (time.sleep(0.005), infer(*arguments))[1])
    onnxruntime = se.RunOptions(execution="onnxruntime")
    hurried = se.profile_camera(tiny_bundle, folder, onnxruntime, rate=1000, deadline_ms=0.01, seconds=0.03)
    assert hurried.statistics.missed == 1
    assert hurried.statistics.dropped > 15
    assert not hurried.method.stream
    for wrong, said in (
        ([*command, "--deadline", "soon"], "soon"),
        ([*command, "--rate", "0"], "--rate"),
        ([*command, "--against", tiny_bundle], "--against"),
        (["profile", tiny_bundle, "--rate", "10"], "--rate requires --video"),
        (["profile", tiny_bundle, "--no-stream"], "--no-stream requires --video"),
        ([*command[:3], tmp_path / "none"], "none"),
    ):
        outcome = process(*wrong)
        assert outcome.code == 2, outcome
        assert said in outcome.err, outcome


@pytest.mark.everything
def test_a_long_day_of_a_camera_leaves_nothing_behind(stream_bundle: Path) -> None:
    """Cuts, dropped frames and reconnects between similar frames: memory is constant, full frames are right."""
    random, by, early = np.random.default_rng(0), dict[str, int](), 0
    with se.open_session(stream_bundle, "onnxruntime") as session:
        stream, other = session.stream(), session.stream(share=0.1)
        dense = stream.dense()
        scene = frames(40)
        for number in range(3000):
            event = random.random()
            if event < 0.01:
                scene = frames(40, int(random.integers(1000)))  # A cut.
            elif event < 0.015:
                stream.reset()  # As after a reconnection.
            elif event < 0.02:
                other.infer({"image": random.integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)})
            frame = scene[number % 40] if event > 0.05 else scene[int(random.integers(40))]
            outputs = stream.infer(frame)
            assert stream.computed is not None
            by[stream.computed.by] = by.get(stream.computed.by, 0) + 1
            if stream.computed.by == "full":
                wanted = dense(frame["image"])
                assert all(agreement(name, x, wanted[name], 1e-4).error <= 1e-4 for name, x in outputs.items())
            if number == 600:
                early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert min(by.values()) > 8, by
    assert set(by) == {"full", "incremental", "fallback"}
    assert late <= 1.02 * early
