"""Models that give NaN, infinity, or no arrays of numbers: lines stay JSON, what is no number is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.camera.conftest import lines, records_of
from tests.commands import process
from tests.package.reseal import reseal
from tests.tiny import make_bundle


def corrupted(folder: Path, value: float, output: str) -> Path:
    """A bundle whose first channel is always `value`."""
    bundle = make_bundle(folder, size=8, preprocessing={"size": 8})
    model = onnx.load(bundle / "model.onnx")
    weights = next(t for t in model.graph.initializer if t.name == "w0")
    values = np.array(onnx.numpy_helper.to_array(weights))
    values[:, 0] = value
    weights.CopyFrom(onnx.numpy_helper.from_array(values, "w0"))
    model.graph.output[0].name = model.graph.node[-1].output[0] = output
    onnx.save(model, bundle / "model.onnx")
    return reseal(bundle)


@pytest.mark.parametrize(("value", "output"), [(np.nan, "features"), (np.inf, "features"), (np.nan, "logits")])
def test_what_is_no_number_is_null_and_counted(value: float, output: str, tmp_path: Path) -> None:
    bundle = corrupted(tmp_path / "bundle", value, output)
    outcome = process("run", bundle, "--source", "test", "--frames", 3)
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (90, 90, 90)).save(image)
    records = records_of(outcome) + records_of(process("run", bundle, "--source", image))
    assert len(records) == 4
    for record in records:
        assert record["not_finite"] == 1
        assert "change" not in record
        if output == "logits":
            assert record["top"] == []
        else:
            assert [feature is None for feature in record["features"]] == [True] + [False] * 7
    assert lines(outcome.err)[-1]["not_finite"] == 3
