"""Frames that are unlike the calibration's, and a score that is no number: lines, counts and metrics say so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.camera.test_not_finite import strict
from tests.camera.test_service import events_of, get
from tests.commands import process
from tests.package.reseal import reseal
from tests.tiny import make_bundle

SIZE = 8
USUAL, UNLIKE, NO_NUMBER = 60, 200, 10
"""Greys, whose novelty is sqrt(grey - 50) / 5."""


def made(folder: Path, usual: float = 50) -> Path:
    """A bundle whose novelty is of the image's brightness."""
    bundle = make_bundle(folder, size=SIZE, preprocessing={"size": SIZE})
    model = onnx.load(bundle / "model.onnx")
    values = {
        "sides": np.array([1, 2, 3]),
        "column": np.array([-1, 1]),
        "usual": np.float32(usual),
        "five": np.float32(5),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), name) for name, x in values.items())
    model.graph.node.extend([
        helper.make_node("ReduceMean", ["cast", "sides"], ["grey"], keepdims=0),
        helper.make_node("Sub", ["grey", "usual"], ["above"]),
        helper.make_node("Sqrt", ["above"], ["root"]),
        helper.make_node("Div", ["root", "five"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "column"], ["novelty"]),
    ])  # fmt: skip
    model.graph.output.append(helper.make_tensor_value_info("novelty", TensorProto.FLOAT, ["batch", 1]))
    onnx.save(model, bundle / "model.onnx")
    outputs = [
        {"name": name, "dtype": "float32", "shape": ["batch", n]} for name, n in (("features", SIZE), ("novelty", 1))
    ]
    return reseal(bundle, name="m", outputs=outputs, novelty={"images": 40, "false_alarms": 0.01})


def test_a_score_that_is_no_number(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, value in enumerate((USUAL, UNLIKE, NO_NUMBER)):
        Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)).save(folder / f"{number}.png")
    done = process("run", made(tmp_path / "bundle"), "--source", folder)
    assert done.code == 0, done.err
    usual, unlike, none = (strict(line) for line in done.out.splitlines())
    assert usual["novelty"] < 1 < unlike["novelty"]
    assert "not_finite" not in unlike
    assert (none["novelty"], none["not_finite"]) == (None, 1)
    assert None not in none["features"]


def test_it_counts_as_unlike(tmp_path: Path) -> None:
    done = process("run", made(tmp_path / "bundle", usual=250), "--source", "test", "--frames", 3)
    counts = events_of(done)[-1]
    assert (counts["unlike"], counts["not_finite"]) == (3, 3)


@pytest.mark.parametrize("usual", [50, 250])
def test_metrics_tell(usual: float, tmp_path: Path, service: Any) -> None:
    run = service(made(tmp_path / "bundle", usual=usual), "--source", "test", "--metrics", "0")
    address = run.event(event="metrics")["address"]
    for _ in range(3):
        run.record()
    values = dict(re.findall(r"^sparsifiner_(\S+) (\S+)$", get(address)[1], re.MULTILINE))
    assert float(values["novelty"]) > 1
    assert math.isinf(float(values["novelty"])) == (usual == 250)  # The root of what is below zero.
    assert float(values["unlike_total"]) >= 2
    assert run.finish()[0] == 0
