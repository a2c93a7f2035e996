"""int8 exports: what is quantised, how far it is from float32, and what happens when it is too far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.torch import save_file

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export import int8 as module
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.int8 import INT8_TARGETS, quantise
from sparsifiner_edge.export.reference import LEAST_OWN_COSINE
from sparsifiner_edge.export.sessions import file_runner, results_of, with_matches, with_outputs
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.sparse.student import save_student
from tests.commands import manifest_of
from tests.everything import first
from tests.models import student, vit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    (folder / "pictures").mkdir()
    for number in range(6):
        Image.fromarray(smooth_images(160, seed=10 + number)[0]).save(folder / "pictures" / f"{number}.png")
    save_student(student(), folder / "student")
    save_file(vit().state_dict(), folder / "w.safetensors")
    export_bundle(folder / "student", folder / "fp32", tokens=True)
    return folder


def int8(place: Path, name: str, source: str | Path, **options: Any) -> Path:
    return export_bundle(
        source, place / name, precision="int8", calibrate=place / "pictures", tokens=True, **options
    )  # fmt: skip


@pytest.mark.parametrize("target", first(INT8_TARGETS))
@pytest.mark.parametrize("sparse", [True, False])
def test_every_linear_layer_and_nothing_else_is_int8(place: Path, target: str, sparse: bool) -> None:
    source, options = (place / "student", {}) if sparse else ("test_vit", {"weights": place / "w.safetensors"})
    made = int8(place, f"{target}-{sparse}", source, int8_target=target, **options)
    manifest = manifest_of(made)
    found = manifest["quantisation"]
    assert (found["calibrated"], found["held_out"]) == (4, 2)
    assert found["quantised"] + len(found["kept"]) == 4 * 6  # qkv, proj, fc1 and fc2; the head stays
    assert min(found["cosines"].values()) >= module.LEAST_MEAN_COSINE
    model = onnx.load(made / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == found["quantised"]
    assert kinds.count("DequantizeLinear") == 2 * found["quantised"]
    assert (kinds.count("SparseAttention") == 6) == sparse
    types = {t.name: t.data_type for t in model.graph.initializer}
    zero_points = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    wanted = onnx.TensorProto.UINT8 if target == "cpu" else onnx.TensorProto.INT8
    assert {types[name] for name in zero_points} == {wanted}
    if target == "tensorrt":
        values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        assert all(int(values[name]) == 0 for name in zero_points)
    scales = [t for t in model.graph.initializer if t.name.endswith("_scale") and len(t.dims) == 1]
    assert len(scales) >= found["quantised"]  # one per channel of each weight
    with open_session(made) as session:
        assert session.description.precision == f"int8, rest {'fp32' if target == 'cpu' else 'fp16'}"
        check_golden(session, open_bundle(made))
        if sparse:
            image = smooth_images(160, seed=99)
            plain = file_runner(onnx.load(place / "fp32" / "model.onnx"))(image)["tokens"]
            assert cosine(session.infer({"image": image})["tokens"], plain).mean() > 0.98
            assert len(model.SerializeToString()) < 0.6 * (place / "fp32" / "model.onnx").stat().st_size


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_products_do_not_saturate(backend: str) -> None:
    """Pairs of the largest uint8 x int8, whose sum exceeds 16 bits: processors without VNNI would cut them off."""
    helper, types = onnx.helper, onnx.TensorProto
    weight = np.full((64, 32), 127, np.int8)
    weight[:, ::2] = -127
    tensors = {
        "weight": weight, "scales": np.full(32, 1 / 127, np.float32), "zeros": np.zeros(32, np.int8),
        "scale": np.float32(1 / 255), "zero": np.uint8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "int8", [helper.make_tensor_value_info("image", types.FLOAT, [1, 40, 64])],
        [helper.make_tensor_value_info("y", types.FLOAT, [1, 40, 32])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with find_backend(Execution(backend=backend)).session(Path("layer"), model.SerializeToString(), "int8") as opened:
        got = opened.infer({"image": np.ones((1, 40, 64), np.float32)})["y"]
    np.testing.assert_allclose(got, np.broadcast_to(np.where(np.arange(32) % 2, 64.0, -64.0), got.shape), rtol=1e-5)


def test_channels_that_exceed_all_others_cost_nothing(place: Path) -> None:
    """The same function in float32, with one channel of each normalisation's output 100 times as large."""
    plain, loud = (onnx.load(place / "fp32" / "model.onnx") for _ in range(2))
    images = [smooth_images(160, seed=20 + n) for n in range(6)]
    weights = {tensor.name: tensor for tensor in loud.graph.initializer}
    norms = {n.output[0]: n for n in loud.graph.node if n.op_type == "LayerNormalization"}
    readers = [n for n in loud.graph.node if n.op_type == "MatMul" and n.input[0] in norms and n.input[1] in weights]
    for node in readers:
        norm = norms[node.input[0]]
        for reader, place, factor in ((node, 1, 0.01), (norm, 1, 100.0), (norm, 2, 100.0)):
            values = onnx.numpy_helper.to_array(weights[reader.input[place]]).copy()
            values[7] *= factor
            reader.input[place] = f"{reader.name}_{place}"  # equal tensors are shared
            loud.graph.initializer.append(onnx.numpy_helper.from_array(values, reader.input[place]))
    assert len(readers) == 2 * 6
    assert cosine(*(file_runner(model)(images[0])["tokens"] for model in (plain, loud))).min() > 0.99999
    found = [quantise(model, images)[1] for model in (plain, loud)]
    assert found[1].cosines == pytest.approx(found[0].cosines, abs=1e-3)
    assert found[1].kept == found[0].kept
    for node in readers:  # Nor does one that nothing reads, as pruning leaves them.
        values = onnx.numpy_helper.to_array(weights_of(loud)[node.input[1]]).copy()
        values[7] = 0
        weights_of(loud)[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(values, node.input[1]))
    assert not quantise(loud, images)[1].kept


def weights_of(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.everything
def test_what_merges_is_no_error_of_the_layers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = export_bundle(place / "student", place / "merged", merge=(12,), tokens=True)
    model = onnx.load(merged / "model.onnx")
    matches = results_of(model, "MatchTokens")
    assert len(matches) > 3
    image = smooth_images(160, seed=99)
    outputs = file_runner(with_outputs(model, matches))(image)
    given = {name: outputs.pop(name) for name in matches}
    for name, values in file_runner(with_matches(model))(image, given).items():
        np.testing.assert_array_equal(values, outputs[name])
    # Noise, whose patches are all as alike: rounding decides, unless the layers that matter most stay in float32.
    images = list(np.random.default_rng(0).integers(0, 256, (3, 1, 160, 160, 3), dtype=np.uint8))
    _, found = quantise(onnx.load(merged / "model.onnx"), images)
    assert 0 < len(found.kept) <= 6
    assert min(found.own_matches_cosines.values()) >= LEAST_OWN_COSINE
    monkeypatch.setattr(module, "MAX_FLOAT_SHARE", 0)
    with pytest.raises(GateError, match=r"where its own matches merge, with 0 of 24 linear layers left"):
        quantise(onnx.load(merged / "model.onnx"), images)
    monkeypatch.setattr(module, "LEAST_OWN_COSINE", 0)
    _, found = quantise(onnx.load(merged / "model.onnx"), images)
    assert found.cosines["tokens"] > 0.995 > 0.9 > found.own_matches_cosines["tokens"]
    assert not quantise(onnx.load(place / "fp32" / "model.onnx"), images)[1].own_matches_cosines


def test_layers_that_hurt_stay_in_float32(place: Path) -> None:
    model = onnx.load(place / "fp32" / "model.onnx")
    images = [smooth_images(160, seed=20 + n) for n in range(6)]
    _, all_int8 = quantise(model, images)
    steps: list[tuple[int, int]] = []
    made, found = quantise(model, images, progress=lambda _, *step: steps.append(step), goal=1.1)
    assert len(found.kept) == int(module.MAX_FLOAT_SHARE * 24)
    assert steps[-1] == (26, 26)
    kept = {node.name: node for node in made.graph.node if node.name in found.kept}
    weights = {t.name: t.data_type for t in made.graph.initializer}
    assert all(weights[node.input[1]] == onnx.TensorProto.FLOAT for node in kept.values())
    onnx.checker.check_model(made)
    assert min(found.cosines.values()) >= min(all_int8.cosines.values())


def test_too_far_from_float32_is_a_failed_gate_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_MEAN_COSINE", 1.1)
    with pytest.raises(GateError, match=r"int8 file has cosine 0\.\d+ to float32, allowed 1.1, with \d+ of 24"):
        int8(place, "refused", place / "student")
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "int8 requires images"),
        ({"precision": "fp32", "calibrate": "pictures"}, "require int8"),
        ({"precision": "fp32", "int8_target": "tensorrt"}, "requires int8"),
        ({"precision": "int8", "int8_target": "gpu"}, "int8 target is 'gpu'"),
        ({"precision": "int4"}, "precision is 'int4'"),
    ],
)
def test_refusals(place: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_bundle(place / "student", place / "x", **options)
    with pytest.raises(ConfigError, match="no images"):
        quantise(onnx.load(place / "fp32" / "model.onnx"), [])
    assert not (place / "x").exists()
