"""Tests of the C and C++ programs in examples/: built, run, and compared with a Python session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import sparsifiner_edge as se
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.ops import native
from tests.flat import export_bundle
from tests.repository import ROOT

INCLUDE = [folder for folder in os.environ.get("TENSORRT_INCLUDE", "").split(os.pathsep) if folder]
"""Folders of headers, as in tests/tensorrt/test_plugin_v3.py."""
SAME = Execution(backend="onnxruntime", kernels="native", threads=2)
pytestmark = [pytest.mark.everything, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")]


def library() -> Path:
    path = native.library_path()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cmake")
    folder, ours = tmp_path_factory.mktemp("client"), Path(onnxruntime.__file__).parent / "capi"
    for words in (
        ["-S", ROOT / "examples/cpp-onnxruntime", "-B", folder, f"-DONNX_RUNTIME={ours}"],
        ["--build", folder],
    ):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return folder / "client"


def answers(client: Path, bundle: Path, frames: np.ndarray, *words: object) -> list[dict[str, Any]]:
    line = [client, library(), bundle, "--threads", SAME.threads, *words]
    done = subprocess.run([str(word) for word in line], input=frames.tobytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["index"] for answer in found] == list(range(len(frames)))
    assert all(answer["ms"] > 0 for answer in found)
    return found


def scene(count: int) -> np.ndarray:
    """Frames in which something small moves."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), np.uint8).repeat(count, 0)
    for number, frame in enumerate(frames):
        frame[40:72, 8 * number : 8 * number + 32] = 30 * number
    return frames


def test_a_bundle_answers_in_c_plus_plus_as_in_python(client: Path, tiny_bundle: Path) -> None:
    frames = scene(3)
    with se.open_session(tiny_bundle, SAME) as session:
        for answer, frame in zip(answers(client, tiny_bundle, frames), frames, strict=True):
            wanted = session.infer({"image": frame[None]})
            assert set(wanted) == set(answer) - {"index", "ms"}
            np.testing.assert_array_equal(np.float32(answer["features"]), wanted["features"].ravel())


@pytest.fixture(scope="module")
def int8_stream(tiny_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return export_bundle(tiny_student, folder, stream=True, precision="int8", calibrate=pictures)


@pytest.mark.parametrize(("name", "share"), [("stream_bundle", 0.125), ("stream_bundle", 0.5), ("int8_stream", 0.125)])
def test_a_stream_follows_a_camera_in_c_plus_plus_as_in_python(
    client: Path, name: str, share: float, request: pytest.FixtureRequest
) -> None:
    stream_bundle, frames = request.getfixturevalue(name), scene(6)
    with se.open_session(stream_bundle, SAME) as session:
        stream = session.stream(share=share)
        for answer, frame in zip(answers(client, stream_bundle, frames, "--share", share), frames, strict=True):
            wanted = stream.infer({"image": frame[None]})["features"]
            assert stream.computed is not None
            assert stream.computed.by == ("incremental" if answer["index"] else "full")
            np.testing.assert_array_equal(np.float32(answer["features"]), wanted.ravel())


@pytest.mark.parametrize(
    ("words", "frames", "says"),
    [
        ([], b"", "usage"),
        (["LIBRARY", "BUNDLE", "--share", "2"], b"", "usage"),
        (["LIBRARY", "BUNDLE", "--share", "half"], b"", "usage"),
        (["LIBRARY", "BUNDLE", "--threads", "2x"], b"", "usage"),
        (["LIBRARY", "BUNDLE", "--threads", "1.5"], b"", "usage"),
        (["LIBRARY", "BUNDLE"], b"short", "frame 0: 5 bytes, expected 160 x 160 x 3"),
        (["LIBRARY", "BUNDLE"], b"", "frame 0: 0 bytes"),
        (["/nowhere.so", "BUNDLE"], b"", "/nowhere.so"),
        (["LIBRARY", "/nowhere"], b"", "/nowhere/model.onnx"),
        (["LIBRARY", "BUNDLE", "--share", "0.5"], b"", "stream/embedding.onnx"),
    ],
)
def test_a_mistake_is_told(client: Path, tiny_bundle: Path, words: list[str], frames: bytes, says: str) -> None:
    line = [{"LIBRARY": str(library()), "BUNDLE": str(tiny_bundle)}.get(word, word) for word in words]
    done = subprocess.run([str(client), *line], input=frames, capture_output=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr.decode()
    assert not done.stdout


def test_the_c_interface_alone(tmp_path: Path) -> None:
    path = library()
    line = [
        "gcc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O2",
        ROOT / "examples/c/attention.c",
        "-I",
        path.parent,
        path,
    ]
    subprocess.run([*line, f"-Wl,-rpath,{path.parent}", "-lm", "-o", tmp_path / "attention"], check=True)
    done = subprocess.run([tmp_path / "attention", "2"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{native.target()}, 2 threads: dense ")
    assert float(done.stdout.split()[-1]) > 0.9
    assert subprocess.run([tmp_path / "attention", "0"], capture_output=True, check=False).returncode == 2


@pytest.mark.skipif(not INCLUDE, reason="TENSORRT_INCLUDE names no headers of TensorRT and CUDA")
def test_the_client_of_engines_compiles(tmp_path: Path) -> None:
    """It is not run, since there is no GPU here."""
    line = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-c", ROOT / "examples/cpp-tensorrt/main.cc"]
    include = [word for folder in INCLUDE for word in ("-isystem", folder)]
    subprocess.run([*line, *include, "-o", tmp_path / "main.o"], check=True)
