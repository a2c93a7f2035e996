"""Fixtures for tests of the camera: bundles, videos, services and their output."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sparsifiner_edge.camera import pattern
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.camera.pattern import draw_pattern
from tests.commands import PROGRAM, Outcome, wait_for
from tests.fuzz.harness import strict_json
from tests.once import Once
from tests.seal import seal_bundle

av = pytest.importorskip("av", reason="the extra camera is not installed")
needs_gst = pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed")


_UNSURE = 0.2


def number_of(brightness: Sequence[float]) -> int | None:
    """Return the number encoded by squares of mean brightness 0-255 (at least the first 32), or None if invalid."""
    levels = brightness[: pattern.CELLS]
    if any(abs(level / 255 - 0.5) < _UNSURE for level in levels):
        return None
    cells = [level > 127.5 for level in levels]
    number = sum(white << place for place, white in enumerate(reversed(cells[: pattern.BITS])))
    return number if cells == pattern.cells_of(number) else None


def make_cells_bundle(folder: Path, work: int = 1) -> Path:
    """Write a bundle whose features are the mean brightness of the image's 8 x 8 squares.

    The number in a frame (see `sparsifiner_edge.camera.pattern`) thus passes through the complete pipeline, model
    included. `image` uint8 [1,64,64,3] -> `features` [1,64]. `work` is the number of image copies that are averaged,
    which costs time like a model.
    """
    folder.mkdir(parents=True)
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 20]>
        cells (uint8[1,64,64,3] image) => (float[1,64] features)
        <int64[4] copies = {{{work}, 1, 1, 1}}, int64[2] mean = {{0, 3}}, int64[4] plane = {{1, 1, 64, 64}},
         int64[2] flat = {{1, 64}}> {{
            pixels = Cast <to = 1> (image)
            many = Expand (pixels, copies)
            grey = ReduceMean <keepdims = 0> (many, mean)
            square = Reshape (grey, plane)
            cells = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (square)
            features = Reshape (cells, flat)
        }}""")
    onnx.save(model, folder / "model.onnx")
    inputs = [{"name": "image", "dtype": "uint8", "shape": [1, 64, 64, 3]}]
    outputs = [{"name": "features", "dtype": "float32", "shape": [1, 64]}]
    manifest = {"name": "cells", "precision": "fp32", "preprocessing": {"size": 64}, "inputs": inputs}
    seal_bundle(folder, manifest | {"outputs": outputs, "tolerances": {"features": 1e-5}})
    return folder


@pytest.fixture(scope="session")
def cells(once: Once) -> Path:
    """A bundle that reads the number in the image."""
    return once("cells", lambda folder: make_cells_bundle(folder / "bundle")) / "bundle"


@pytest.fixture(scope="session")
def video(once: Once) -> Path:
    """Video of thirty numbered frames."""
    frames = [draw_pattern(n, 320, 240) for n in range(30)]
    return once("video", lambda folder: encode(folder / "numbered.mp4", frames)) / "numbered.mp4"


def encode(path: Path, pictures: list[np.ndarray[Any, Any]], codec: str = "libx264", **options: str) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options={"g": "10"} | options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def lines(text: str) -> list[dict[str, Any]]:
    """Parse complete lines of strict JSON, without NaN."""
    assert text == "" or text.endswith("\n")
    return [strict_json(line) for line in text.split("\n")[:-1]]


def records_of(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.code == 0, outcome.err
    return lines(outcome.out)


def numbers_of(records: list[dict[str, Any]]) -> list[int | None]:
    return [number_of(record["features"]) for record in records]


def record(**fields: Any) -> FrameRecord:
    times = ("monotonic_s", "capture_ms", "preprocess_ms", "queued_ms", "infer_ms", "postprocess_ms", "end_to_end_ms")
    known = {"source": "x", "box": (0, 0, 1, 1), "frame": 3, "skipped": 0, "pts_s": None, "frame_age_ms": None}
    known |= dict.fromkeys(times, 1.0)
    return FrameRecord(**known | fields)


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric(address: str, name: str) -> float:
    """Return the value of one metric."""
    values = dict(line.rsplit(" ", 1) for line in get(address)[1].splitlines() if not line.startswith("#"))
    return float(values[f"sparsifiner_{name}"])


class Service:
    """`sparsifiner-edge run` in a separate process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        line = [str(x) for x in (*PROGRAM, "run", *arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        self.process = subprocess.Popen(line, text=True, **streams)

    def record(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        return dict(json.loads(line))

    def event(self, **wanted: Any) -> dict[str, Any]:
        """Return the next event with these fields."""
        for line in self.process.stderr:
            event = json.loads(line)
            if wanted.items() <= event.items():
                return dict(event)
        raise AssertionError(f"no event {wanted}")

    def decoder(self) -> int:
        """Return the decoding process; while a source is lost, there may be none."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return int(wait_for(lambda: " ".join(path.read_text() for path in tasks.glob("*/children")).split())[0])

    def finish(self, seconds: float = 20) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
        """Send SIGTERM; return the exit code, the remaining records and the remaining events."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=seconds)
        assert "Traceback" not in err
        return self.process.returncode, lines(out or ""), lines(err)


@pytest.fixture
def service() -> Iterator[Any]:
    """Starts services and ends those that still run."""
    started: list[Service] = []

    def start(*arguments: Any, **options: Any) -> Service:
        started.append(Service(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
