"""Models that give NaN, infinity, or no arrays of numbers: lines stay JSON, what is no number is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.session import validate_outputs
from tests.commands import process
from tests.package.reseal import reseal
from tests.tiny import make_bundle


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def corrupted(folder: Path, value: float, output: str = "features") -> Path:
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features(value: float, tmp_path: Path) -> None:
    bundle = corrupted(tmp_path / "bundle", value)
    outcome = process("run", bundle, "--source", "test", "--frames", 3)
    assert outcome.code == 0, outcome.err
    records = [strict(line) for line in outcome.out.splitlines()]
    for record in records:
        assert record["features"][0] is None
        assert all(isinstance(x, float) for x in record["features"][1:])
        assert record["not_finite"] == 1
        assert "change" not in record
    done = [strict(line) for line in outcome.err.splitlines()][-1]
    assert done["event"] == "done"
    assert done["not_finite"] == len(records) == 3
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), (90, 90, 90)).save(image)
    outcome = process("run", bundle, "--source", image)
    assert strict(outcome.out)["not_finite"] == 1


def test_a_classifier_answers_no_class(tmp_path: Path) -> None:
    bundle = corrupted(tmp_path / "bundle", np.nan, "logits")
    outcome = process("run", bundle, "--source", "test", "--frames", 1)
    record = strict(outcome.out)
    assert (record["top"], record["not_finite"]) == ([], 1)


@pytest.mark.parametrize(
    ("node", "name", "said"),
    [
        (onnx.helper.make_node("ReduceSum", ["features"], ["x"], keepdims=0), "features", "'features' .* has shape []"),
        (onnx.helper.make_node("Unsqueeze", ["features", "axes"], ["x"]), "logits", "'logits' .* has shape [1, 1, 8]"),
        (onnx.helper.make_node("NonZero", ["zero"], ["x"]), "features", "'features' .* has shape [1, 0]"),
        (onnx.helper.make_node("Cast", ["features"], ["x"], to=8), "features", "'features' .* has type tensor(string)"),
        (onnx.helper.make_node("SequenceConstruct", ["features"], ["x"]), "features", "'features' .* has type seq"),
    ],
)
def test_an_output_that_is_none_names_itself(node: Any, name: str, said: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", size=8, preprocessing={"size": 8})
    model = onnx.load(bundle / "model.onnx")
    for other in model.graph.node:
        other.output[:] = ["before" if out == "features" else out for out in other.output]
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.input[:] = ["before" if i == "features" else i for i in made.input]
    made.output[:] = [name]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    model.graph.node.append(made)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    if node.op_type == "SequenceConstruct":
        kind = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, None))
        model.graph.output[0].type.CopyFrom(kind)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)
    with pytest.raises(BackendError) as caught, open_session(bundle) as session:
        session.infer({"image": np.zeros((1, 8, 8, 3), np.uint8)})
    for word in said.split(" .* "):
        assert word in caught.value.what
    outcome = process("run", bundle, "--source", "test", "--frames", 1)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert said.partition(" ")[0] in outcome.err


def test_ranks_and_kinds() -> None:
    validate_outputs("m", {"features": np.zeros((1, 2)), "other": np.zeros((1, 2, 3, 4)), "n": np.zeros(3, np.int64)})
    for wrong in ({"tokens": np.zeros((1, 2))}, {"x": np.array(["a"])}, {"x": [1.0]}, {"x": np.zeros((0, 3))}):
        with pytest.raises(BackendError, match="Output '"):
            validate_outputs("m", wrong)
