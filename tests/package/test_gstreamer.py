"""Tests with the real GStreamer: our element in the system's Python, and the plain file in `onnxinference`."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from sparsifiner_edge.bundle.sign import sign_bundle
from sparsifiner_edge.images import fit_image
from sparsifiner_edge.package import package_bundle
from tests.flat import open_session, verify_bundle

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "export" / "gstreamer"
PYTHON = Path(sys.prefix) / "gstreamer" / "bin" / "python"
"""The system's Python with the packages that the element needs; made by `make everything`."""


def needs(element: str, why: str, **environment: str) -> pytest.MarkDecorator:
    inspect = shutil.which("gst-inspect-1.0")
    look = [str(inspect), "--exists", element]
    there = inspect and PYTHON.exists() and not subprocess.call(look, env=os.environ | environment)
    return pytest.mark.skipif(not there, reason=why)


needs_element = needs(
    "sparsifiner",
    f"{PYTHON}, GStreamer's Python loader or GstAnalytics is missing (`make everything` brings them)",
    GST_PLUGIN_PATH=str(PLUGINS),
)
needs_onnx = needs("onnxinference", "GStreamer's onnxinference is not installed")
FITTING = (
    "videoconvert ! aspectratiocrop aspect-ratio=1/1 ! videoscale ! "
    "video/x-raw,format=RGB,width=160,height=160,pixel-aspect-ratio=1/1"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a package's README, with the checkout instead of an installed package."""
    return os.environ | {
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GST_REGISTRY": str(tmp_path_factory.mktemp("registry") / "registry.bin"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, keys: Path) -> Path:
    """Package of a signed bundle, which stays signed."""
    folder = tmp_path_factory.mktemp("gstreamer")
    sign_bundle(shutil.copytree(tiny_bundle, folder / "bundle"), keys / "key.pem")
    package_bundle(folder / "bundle", "gstreamer", folder / "out")
    return folder / "out"


def launch(pipeline: str, environment: dict[str, str], plugins: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["gst-launch-1.0", "-m", *shlex.split(pipeline)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment | {"GST_PLUGIN_PATH": str(plugins)},
    )


def pull(pipeline: str, environment: dict[str, str], plugins: Path, folder: Path) -> tuple[list[Any], list[Any]]:
    """Return messages and frames of tests/package/pipeline.py; pixels are left in `folder`."""
    script = Path(__file__).with_name("pipeline.py")
    done = subprocess.run(
        [PYTHON, script, pipeline, folder],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment | {"GST_PLUGIN_PATH": str(plugins)},
    )
    assert done.returncode == 0, done.stderr
    messages, frames = json.loads(done.stdout.splitlines()[-1])
    return messages, frames


@pytest.mark.everything
@needs_element
@needs_onnx
def test_the_readmes_commands(package: Path, environment: dict[str, str]) -> None:
    """gst-launch-1.0 with the package's own plugin and bundle, and with GStreamer's."""
    readme = (package / "README.md").read_text()
    assert re.search(r"export .*ORT_DISABLE_TELEMETRY=1", readme)
    (line,) = re.findall(r"gst-launch-1\.0 -m (videotestsrc.*)", readme)
    done = launch(line.replace("num-buffers=25", "num-buffers=3"), environment, package / "plugins", package)
    assert done.returncode == 0, done.stderr
    messages = re.findall(r'from element "sparsifiner0" \(element\): sparsifiner, (.*)', done.stdout)
    assert len(messages) == 3
    for message in messages:
        assert re.search(r"pts=\(guint64\)\d+, infer-ms=\(double\)[\d.]+, answer=\(string\)", message)
    (line,) = re.findall(r"gst-launch-1\.0 (videotestsrc .*onnxinference.*)", readme.replace("\\\n", " "))
    done = launch(line.replace("num-buffers=25", "num-buffers=2"), environment, package / "plugins", package)
    assert done.returncode == 0, done.stderr


@needs_element
def test_metadata_and_messages_are_the_sessions(
    package: Path, environment: dict[str, str], tiny_bundle: Path, keys: Path, tmp_path: Path
) -> None:
    """GStreamer pads rows of 333 pixels; the answer is that of the frame's centre square."""
    pipeline = (
        "videotestsrc pattern=snow num-buffers=2 ! video/x-raw,width=333,height=250 ! videoconvert ! "
        f"sparsifiner bundle={package / 'bundle'} public-key={keys / 'key.pub'} ! appsink name=out sync=false"
    )
    messages, frames = pull(pipeline, environment, package / "plugins", tmp_path)
    assert len(messages) == len(frames) == 2
    with open_session(tiny_bundle, threads=1, kernels="portable") as session:
        for number, (message, frame) in enumerate(zip(messages, frames, strict=True)):
            pixels = np.frombuffer((tmp_path / f"frame{number}").read_bytes(), np.uint8).reshape(250, 333, 3)
            image = np.asarray(fit_image(Image.fromarray(pixels), 160))
            logits = session.infer({"image": image[None]})["logits"][0].astype(np.float64)
            expected = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-expected, kind="stable")[:5]
            top = json.loads(message["answer"])["top"]
            assert [entry["class"] for entry in top] == best.tolist()
            assert np.allclose([entry["probability"] for entry in top], expected[best], atol=1e-4)
            assert message["infer-ms"] > 0
            assert [label for label, _ in frame["classes"]] == [entry["label"] for entry in top]
            assert np.allclose([level for _, level in frame["classes"]], expected[best], atol=1e-4)
    assert [message["pts"] for message in messages] == [0, 33333333]


@needs_element
@pytest.mark.parametrize(
    ("properties", "said"),
    [("bundle=nowhere", "nowhere does not exist."), ("bundle={bundle} public-key={key}", "is not signed")],
)
def test_what_is_wrong_is_the_pipelines_error(
    properties: str, said: str, package: Path, environment: dict[str, str], tiny_bundle: Path, keys: Path
) -> None:
    element = f"sparsifiner {properties.format(bundle=tiny_bundle, key=keys / 'key.pub')}"
    pipeline = f"videotestsrc num-buffers=1 ! videoconvert ! {element} ! fakesink"
    done = launch(pipeline, environment, package / "plugins", package)
    assert done.returncode != 0
    assert re.search(f"ERROR: from element .*{said}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@needs_element
def test_a_gstreamer_without_analytics_and_a_model_without_classes(
    package: Path, environment: dict[str, str], dynamic_bundle: Path, tmp_path: Path
) -> None:
    """As before 1.24: the GstAnalytics binding is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import gi\nplain = gi.require_version\n"
        "def require(name, version):\n"
        "    if name == 'GstAnalytics': raise ValueError('Namespace GstAnalytics not available')\n"
        "    plain(name, version)\n"
        "gi.require_version = require\n"
    )
    changed = environment | {
        "PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}",
        "GST_REGISTRY": str(tmp_path / "registry.bin"),
    }
    pipeline = f"videotestsrc num-buffers=2 ! videoconvert ! sparsifiner bundle={dynamic_bundle} ! fakesink"
    done = launch(pipeline, changed, package / "plugins", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sparsifiner, pts=") == done.stdout.count("features") == 2


@needs_onnx
@pytest.mark.parametrize("name", ["tiny_bundle", "dynamic_bundle"])
def test_the_plain_file_in_onnxinference(
    name: str, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every output arrives under its id, with the values of a session."""
    bundle: Path = request.getfixturevalue(name)
    out = tmp_path / "out"
    package_bundle(bundle, "gstreamer", out)
    inference = f"onnxinference model-file={out / 'bundle' / 'model.onnx'} input-image-format=hwc"
    pipeline = f"videotestsrc pattern=snow num-buffers=1 ! {FITTING} ! {inference} ! appsink name=out sync=false"
    _, (frame,) = pull(pipeline, environment, out / "plugins", tmp_path)
    image = np.frombuffer((tmp_path / "frame0").read_bytes(), np.uint8).reshape(1, 160, 160, 3)
    with open_session(bundle, threads=1, kernels="portable") as session:
        expected = session.infer({"image": image})
    assert set(frame["tensors"]) == {f"sparsifiner-edge-{output}" for output in expected}
    for output in set(expected) - {"token_positions", "tokens"}:
        values = np.array(frame["tensors"][f"sparsifiner-edge-{output}"])
        assert np.abs(values - expected[output].ravel()).max() < 1e-3 * np.ptp(expected[output]), output


def test_gstreamers_own_element_is_told_of_the_tensors(tiny_bundle: Path, tmp_path: Path) -> None:
    package_bundle(tiny_bundle, "gstreamer", tmp_path / "out")
    model, told = tmp_path / "out/model.onnx", configparser.ConfigParser()
    told.read(f"{model}.modelinfo")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert told.sections() == ["modelinfo", *(x.name for x in (*session.get_inputs(), *session.get_outputs()))]
    for direction, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for tensor in tensors:
            section = told[tensor.name]
            kind = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}[tensor.type]
            assert (section["dir"], section["type"]) == (direction, kind)
            assert section["dims"] == ",".join(map(str, tensor.shape))
    assert told["image"]["ranges"].split(";") == ["0.0,255.0"] * 3
    assert verify_bundle(tmp_path / "out/bundle").passed
