"""What comes after a frame: lines, addresses, pipelines, changes of the scene, the overlay."""

from __future__ import annotations

import ast
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.camera import child
from sparsifiner_edge.camera.answers import Class, FrameRecord, ImageRecord
from sparsifiner_edge.camera.gstreamer import _images, launch_line, read_pipeline
from sparsifiner_edge.camera.health import parse_host_port
from sparsifiner_edge.camera.json_lines import line_of
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.overlay import text_lines
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.prepare import fit_pillow
from sparsifiner_edge.errors import ArtifactError
from tests.tiny import make_bundle


@pytest.mark.parametrize(
    ("text", "address"),
    [("9090", ("127.0.0.1", 9090)), ("0.0.0.0:80", ("0.0.0.0", 80)), (":7", ("127.0.0.1", 7)), ("[::1]:5", ("::1", 5))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_host_port(text) == address


def test_what_is_added_to_a_pipeline() -> None:
    line = launch_line("videotestsrc pattern=ball ! video/x-raw,width=64", 20, 7)
    assert line[:5] == ["gst-launch-1.0", "-q", "videotestsrc", "pattern=ball", "!"]
    assert "aspectratiocrop aspect-ratio=1/1 !" in " ".join(line)
    assert line[-2:] == ["fd=7", "sync=false"]
    wide = " ".join(launch_line("a", (294, 518), 7))
    assert "aspectratiocrop aspect-ratio=37/21 !" in wide
    assert "width=518,height=294," in wide


def test_rows_of_a_rectangle_from_a_pipeline() -> None:
    pixels = np.arange(2 * 3 * 7 * 3, dtype=np.uint8).reshape(2, 3, 7, 3)
    padded = np.pad(pixels.reshape(2, 3, 21), ((0, 0), (0, 0), (0, 3)))  # to four bytes
    frames = [frame.image for frame in _images(io.BytesIO(padded.tobytes() + b"a part"), (3, 7))]
    assert len(frames) == 2
    for image, expected in zip(frames, pixels, strict=True):
        assert np.array_equal(image, expected)


def test_a_pipeline_that_remarks_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads would be full after 64 KiB, and the pipeline would wait for ever."""
    (tmp_path / "gst-launch-1.0").write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "fd = int(next(word for word in sys.argv if word.startswith('fd='))[3:])\n"
        "for number in range(5):\n"
        "    os.write(2, b'WARNING: a late frame\\n' * 10_000)\n"
        "    os.write(fd, bytes([number]) * 48)\n"
        "os.write(2, b'ERROR: from element x: location=rtsp://u:secret@h is gone\\nERROR: and more\\n')\n"
        "os.write(2, b'x' * 1_000_000)\n"
        "sys.exit(1)\n"
    )
    (tmp_path / "gst-launch-1.0").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen, before = [], threading.active_count()
    with pytest.raises(ValueError, match=r"^ERROR: from element x: location=rtsp://u:secret@h is gone\n$"):
        seen.extend(frame.image[0, 0, 0] for frame in read_pipeline("a", 4))
    assert seen == list(range(5))
    assert threading.active_count() == before


@pytest.mark.parametrize("value", ["stretch", "letterbox", 5, None, ["centre square"]])
def test_a_manifest_that_resizes_otherwise(value: Any, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", preprocessing={"size": 4, "resize": value})
    with pytest.raises(ArtifactError, match=r"preprocessing\.resize is"):
        Model(bundle)


def test_a_rectangular_model_on_frames(tmp_path: Path) -> None:
    manifest = {"size": [40, 60], "resize": "centre rectangle, bicubic"}
    bundle = make_bundle(tmp_path / "b", size=(40, 60), preprocessing=manifest)
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[18:462] = (255, 0, 0)  # A model of this shape sees the middle 427 rows.
    with Model(bundle) as model:
        assert model.size == (40, 60)
        found, red = (
            model.answer(model.infer(fit_pillow(Image.fromarray(pixels), model.size))).features
            for pixels in (frame, np.broadcast_to(frame[240], frame.shape))
        )
    assert found is not None
    np.testing.assert_allclose(found, red, atol=0.02 * np.ptp(red))


def test_a_scene_that_stays_does_not_change(cells: Path) -> None:
    with Model(cells) as model:
        picture = fit_pillow(Image.fromarray(draw_pattern(1)), model.size)
        other = fit_pillow(Image.fromarray(draw_pattern(123456)), model.size)
        found = [model.change(model.infer(p)) for p in (picture, picture, other, picture)]
    assert found[0] == 0
    assert found[1] == pytest.approx(0, abs=1e-9)
    assert found[2] is not None
    assert found[3] is not None
    assert found[2] > 0.05 > found[3]


def test_a_dense_map_in_a_few_numbers(cells: Path) -> None:
    mask = np.zeros((1, 4, 8), np.float32)
    mask[0, 1:3, 6:] = 0.9
    depth = np.linspace(2, 5, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    with Model(cells) as model:
        answer = model.answer({"mask": mask, "depth": depth, "tokens": mask})
        assert answer.maps is not None
        first, second = answer.maps
        assert (first.output, first.area, first.centroid) == ("mask", 4 / 32, (7 / 8, 0.5))
        assert first.greatest == pytest.approx(0.9)
        assert (second.output, second.least, second.greatest, second.area) == ("depth", 2, 5, None)
        heat = model.heat({"depth": depth})
        assert heat is not None
        assert (heat.min(), heat.max()) == (0, 1)
        assert np.array_equal(model.heat({"mask": mask, "depth": depth}), mask[0])
        empty = model.answer({"mask": np.zeros((1, 4, 8), np.float32)}).maps
        assert empty is not None
        assert (empty[0].area, empty[0].centroid) == (0, None)
        mask[0, 0, 0] = np.nan
        broken = model.answer({"mask": mask})
        assert (broken.maps, broken.not_finite) == ([], 1)
        with pytest.raises(ArtifactError, match="needed are logits, features or a dense map"):
            model.answer({"mask": np.zeros((1, 2, 4, 8), np.float32)})
    lines = text_lines(record(maps=list(answer.maps), infer_ms=3.2), 25.0)
    assert lines[:2] == ["mask  12% of the image", "depth  mean 3.5"]


def test_text_in_the_overlay() -> None:
    top = [Class(1, "a\x00\u202eb" + "x" * 99, 0.5)]
    first, second = text_lines(record(top=top, infer_ms=3.2), 24.99)
    assert first.startswith("a??bx")
    assert first.endswith("\u2026  50%")
    assert second == "25.0 fps   model 3 ms"
    assert text_lines(record(change=0.1, frame_age_ms=33.4), 5) == ["change 0.100", "5.0 fps   age 33 ms"]


def record(**fields: Any) -> FrameRecord:
    times = ("monotonic_s", "capture_ms", "preprocess_ms", "wait_ms", "infer_ms", "postprocess_ms", "end_to_end_ms")
    known = {"source": "x", "frame": 3, "skipped": 0, "pts_s": None, "frame_age_ms": None} | dict.fromkeys(times, 1.0)
    return FrameRecord(**known | fields)


def test_a_line_begins_with_its_source_and_leaves_out_what_is_none() -> None:
    said = json.loads(line_of(record(top=[Class(1, "a", 0.5)])))
    assert list(said)[:4] == ["source", "frame", "skipped", "monotonic_s"]
    assert list(said)[-2:] == ["end_to_end_ms", "top"]
    assert said["top"] == [{"class": 1, "label": "a", "probability": 0.5}]
    assert json.loads(line_of(ImageRecord("x", error="no"))) == {"source": "x", "error": "no"}


def test_no_clock_that_can_be_set_is_read() -> None:
    """A jump of the wall clock then changes nothing."""
    for path in Path(child.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr in ("monotonic", "monotonic_ns", "perf_counter_ns", "sleep", "thread_time"), (
                    path,
                    node.attr,
                )
            assert not (isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")), path
