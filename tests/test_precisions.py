"""Tests of float16 and int8 exports: stored types, error against float32 and the reaction to too large an error."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError, ConfigError, GateError
from sparsifiner_edge.execution import INT8_TARGETS, Execution
from sparsifiner_edge.export import fp16, int8
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.reference import LEAST_FREE_COSINE
from sparsifiner_edge.export.sessions import file_runner, results_of, with_matches, with_outputs
from sparsifiner_edge.metrics import align, cosine
from sparsifiner_edge.ops.schema import OPERATORS
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.open import find_backend
from tests import flat
from tests.commands import manifest_of
from tests.everything import first
from tests.models import KINDS, TINY, student

SMALL = ("edge", "no cells", "paper", "pruned", "dense")


@functools.cache
def _file(kind: str) -> bytes:
    deployed = deploy(student(sparsity=KINDS[kind], depth=2), tokens=True)
    return export_graph(deployed, 160, 1, deployed.output_names).SerializeToString()


def small_file(kind: str) -> onnx.ModelProto:
    """An exported float32 file of two layers."""
    return onnx.load_from_string(_file(kind))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor of the graph, including results inside function bodies."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in model.graph.initializer
    }


@pytest.mark.parametrize("kind", SMALL)
def test_islands_stay_float32_and_the_rest_does_not(kind: str) -> None:
    model, counts, _ = fp16.convert(small_file(kind))
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    for node in model.graph.node:
        floats = {types[name] for name in node.input if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        if node.op_type in ("LayerNormalization", "Softmax", "Conv", "TopK"):
            assert floats <= {TensorProto.FLOAT}, node  # TopK also sorts indices.
        if node.domain == "sparsifiner":  # Resize's sizes are float32 by its schema.
            for name, tensor in zip(node.input, OPERATORS[node.op_type].inputs, strict=True):
                own = {("float32",): TensorProto.FLOAT, ("int32",): TensorProto.INT32}
                assert types[name] == own.get(tensor.dtypes, TensorProto.FLOAT16), node
        if node.op_type in ("MatMul", "Gemm", "Gelu"):
            assert floats == {TensorProto.FLOAT16}, node
    assert {types[o.name] for o in model.graph.output} <= {TensorProto.FLOAT, TensorProto.INT32}
    assert counts[TensorProto.FLOAT16] > counts[TensorProto.FLOAT] > 0
    assert model.graph.node[0].op_type == "Cast"
    assert len(model.SerializeToString()) < 0.75 * len(small_file(kind).SerializeToString())


@pytest.mark.parametrize("kind", SMALL)
def test_it_is_close_to_float32_on_another_image(kind: str) -> None:
    single = small_file(kind)
    half, found = fp16.to_fp16(single, [smooth_images(160)])
    assert min(found.least_row_cosines.values()) >= fp16.LEAST_ROW_COSINE
    image = smooth_images(160, seed=9)
    wanted = file_runner(single)(image)
    outputs, lost = align(file_runner(half)(image), wanted)
    assert lost <= 2
    assert {value.dtype for value in outputs.values()} == {np.dtype(np.float32)}
    assert all(cosine(value, wanted[name]).min() > 0.999 for name, value in outputs.items())
    assert any(not np.array_equal(value, wanted[name]) for name, value in outputs.items())


def test_a_bundle_says_what_it_is_and_what_ran(exported: Path, tmp_path: Path) -> None:
    made = flat.export_bundle(exported / "student", tmp_path / "fp16", precision="fp16", batch="dynamic", tokens=True)
    manifest = manifest_of(made)
    assert manifest["precision"] == "fp16"
    assert set(manifest["tolerances"].values()) == {0.05}
    assert {o["dtype"] for o in manifest["outputs"]} == {"float32"}
    found = manifest["float16"]["least_row_cosines"]
    assert set(found) == {"logits", "features", "tokens"}
    assert min(found.values()) >= 0.999
    with flat.open_session(made) as session:
        check_golden(session, open_bundle(made))
        assert (session.description.precision, session.description.kernels) == ("fp16", "function bodies")
        together = session.infer({"image": smooth_images(160, 3)})["logits"]
        alone = session.infer({"image": smooth_images(160, 3)[1:2]})["logits"]
    np.testing.assert_allclose(together[1:2], alone, atol=2e-2 * np.ptp(alone))
    with pytest.raises(BackendError, match="native kernels do not support float16"):
        flat.open_session(made, kernels="native")


def scaled(model: onnx.ModelProto, place: int, largest: float) -> str:
    """Scale the weights of a linear layer to this maximum and return their name."""
    weights = {t.name: t for t in model.graph.initializer}
    tensor = [weights[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights][place]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values * (largest / np.abs(values).max()), tensor.name))
    return tensor.name


def test_what_float16_cannot_hold_or_is_too_far_is_a_failed_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_file("dense"), [smooth_images(160)]
    scaled(model, -2, 10)  # The weights fit, their results overflow.
    scaled(model, -1, 6e4)
    with pytest.raises(GateError, match=r"Activations of '\w+' reach \d\.\d+e\+0\d, beyond float16"):
        fp16.to_fp16(model, images)
    with pytest.raises(GateError, match=f"Weight '{scaled(model, 0, 7e4)}' holds 70000, beyond float16"):
        fp16.to_fp16(model, images)
    monkeypatch.setattr(fp16, "LEAST_ROW_COSINE", 1.1)
    with pytest.raises(GateError, match=r"float16 file has cosine \d\.\d+ to float32, allowed 1.1") as caught:
        fp16.to_fp16(small_file("dense"), images)
    assert caught.value.fix == "Nothing was written. Export fp32, or int8 with --int8-target cpu."


@pytest.mark.parametrize("target", first(INT8_TARGETS))
@pytest.mark.parametrize("sparse", [True, False])
def test_every_linear_layer_and_nothing_else_is_int8(
    exported: Path, folder: Path, tmp_path: Path, target: str, sparse: bool
) -> None:
    options: dict[str, Any] = {} if sparse else {"weights": exported / "weights.safetensors"}
    made = flat.export_bundle(
        exported / "student" if sparse else TINY,
        tmp_path / "int8",
        precision="int8",
        calibrate=folder,
        tokens=True,
        int8_target=target,
        **options,
    )
    found = manifest_of(made)["quantisation"]
    assert (found["calibrated"], found["held_out"]) == (8, 4)
    assert found["quantised"] + len(found["kept"]) == 4 * 6  # qkv, proj, fc1 and fc2; the head stays float
    assert min(found["cosines"].values()) >= int8.LEAST_MEAN_COSINE
    model = onnx.load(made / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == found["quantised"]
    assert kinds.count("DequantizeLinear") == 2 * found["quantised"]
    assert (kinds.count("SparseAttention") == 6) == sparse
    types = {t.name: t.data_type for t in model.graph.initializer}
    zero_points = [node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    wanted = TensorProto.UINT8 if target == "cpu" else TensorProto.INT8
    assert {types[name] for name in zero_points} == {wanted}
    if target == "tensorrt":
        values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        assert all(int(values[name]) == 0 for name in zero_points)
    scales = [t for t in model.graph.initializer if t.name.endswith("_scale") and len(t.dims) == 1]
    assert len(scales) >= found["quantised"]  # one scale per channel of each weight
    with flat.open_session(made) as session:
        assert session.description.precision == f"int8, rest {'fp32' if target == 'cpu' else 'fp16'}"
        check_golden(session, open_bundle(made))
        if sparse:
            image = smooth_images(160, seed=99)
            plain = file_runner(onnx.load(exported / "bundle" / "model.onnx"))(image)["tokens"]
            assert cosine(session.infer({"image": image})["tokens"], plain).mean() > 0.98
            assert len(model.SerializeToString()) < 0.6 * (exported / "bundle" / "model.onnx").stat().st_size


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_int8_products_do_not_saturate(backend: str) -> None:
    """Pairs of the largest uint8 x int8, whose sum exceeds 16 bits: processors without VNNI would saturate."""
    helper, types = onnx.helper, TensorProto
    weight = np.full((64, 32), 127, np.int8)
    weight[:, ::2] = -127
    tensors = {
        "weight": weight,
        "scales": np.full(32, 1 / 127, np.float32),
        "zeros": np.zeros(32, np.int8),
        "scale": np.float32(1 / 255),
        "zero": np.uint8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("image", types.FLOAT, [1, 40, 64])],
        [helper.make_tensor_value_info("y", types.FLOAT, [1, 40, 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with find_backend(Execution(backend=backend)).session(Path("layer"), model.SerializeToString(), "int8") as opened:
        got = opened.infer({"image": np.ones((1, 40, 64), np.float32)})["y"]
    np.testing.assert_allclose(got, np.broadcast_to(np.where(np.arange(32) % 2, 64.0, -64.0), got.shape), rtol=1e-5)


def test_channels_that_exceed_all_others_cost_nothing(exported: Path) -> None:
    """The same function in float32, with one channel of each normalisation output 100 times as large."""
    plain, loud = (onnx.load(exported / "bundle" / "model.onnx") for _ in range(2))
    images = [smooth_images(160, seed=20 + n) for n in range(6)]
    weights = {tensor.name: tensor for tensor in loud.graph.initializer}
    norms = {n.output[0]: n for n in loud.graph.node if n.op_type == "LayerNormalization"}
    readers = [n for n in loud.graph.node if n.op_type == "MatMul" and n.input[0] in norms and n.input[1] in weights]
    for node in readers:
        norm = norms[node.input[0]]
        for reader, place, factor in ((node, 1, 0.01), (norm, 1, 100.0), (norm, 2, 100.0)):
            values = numpy_helper.to_array(weights[reader.input[place]]).copy()
            values[7] *= factor
            reader.input[place] = f"{reader.name}_{place}"  # equal tensors are shared
            loud.graph.initializer.append(numpy_helper.from_array(values, reader.input[place]))
    assert len(readers) == 2 * 6
    assert cosine(*(file_runner(model)(images[0])["tokens"] for model in (plain, loud))).min() > 0.99999
    found = [int8.quantise(model, images)[1] for model in (plain, loud)]
    assert found[1].cosines == pytest.approx(found[0].cosines, abs=1e-3)
    assert found[1].kept == found[0].kept


@pytest.mark.everything
def test_what_merges_is_no_error_of_the_layers(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = flat.export_bundle(exported / "student", tmp_path / "merged", merge=(12,), tokens=True)
    model = onnx.load(merged / "model.onnx")
    matches = results_of(model, "MatchTokens")
    assert len(matches) > 3
    image = smooth_images(160, seed=99)
    outputs = file_runner(with_outputs(model, matches))(image)
    given = {name: outputs.pop(name) for name in matches}
    for name, values in file_runner(with_matches(model))(image, given).items():
        np.testing.assert_array_equal(values, outputs[name])
    # Noise has similar patches, so rounding decides unless the most sensitive layers stay in float32.
    images = list(np.random.default_rng(0).integers(0, 256, (3, 1, 160, 160, 3), dtype=np.uint8))
    _, found = int8.quantise(onnx.load(merged / "model.onnx"), images)
    assert 0 < len(found.kept) <= 6
    assert min(found.own_matches_cosines.values()) >= LEAST_FREE_COSINE
    monkeypatch.setattr(int8, "MAX_FLOAT_SHARE", 0)
    with pytest.raises(GateError, match=r"with its own merge matches, with 0 of 24 linear layers left"):
        int8.quantise(onnx.load(merged / "model.onnx"), images)
    monkeypatch.setattr(int8, "LEAST_FREE_COSINE", 0)
    _, found = int8.quantise(onnx.load(merged / "model.onnx"), images)
    assert found.cosines["tokens"] > 0.995 > 0.9 > found.own_matches_cosines["tokens"]
    assert not int8.quantise(onnx.load(exported / "bundle" / "model.onnx"), images)[1].own_matches_cosines


def test_layers_that_hurt_stay_in_float32(exported: Path) -> None:
    model = onnx.load(exported / "bundle" / "model.onnx")
    images = [smooth_images(160, seed=20 + n) for n in range(6)]
    _, all_int8 = int8.quantise(model, images)
    steps: list[tuple[int, int]] = []
    made, found = int8.quantise(model, images, progress=lambda _, *step: steps.append(step), goal=1.1)
    assert len(found.kept) == int(int8.MAX_FLOAT_SHARE * 24)
    assert steps[-1] == (26, 26)
    kept = {node.name: node for node in made.graph.node if node.name in found.kept}
    weights = {t.name: t.data_type for t in made.graph.initializer}
    assert all(weights[node.input[1]] == TensorProto.FLOAT for node in kept.values())
    onnx.checker.check_model(made)
    assert min(found.cosines.values()) >= min(all_int8.cosines.values())


def test_too_far_from_float32_is_a_failed_gate_and_writes_nothing(
    exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "LEAST_MEAN_COSINE", 1.1)
    with pytest.raises(GateError, match=r"int8 file has cosine 0\.\d+ to float32, allowed 1.1, with \d+ of 24"):
        flat.export_bundle(exported / "student", tmp_path / "refused", precision="int8", calibrate=folder)
    assert not (tmp_path / "refused").exists()


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
def test_refusals(exported: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flat.export_bundle(exported / "student", tmp_path / "x", **options)
    with pytest.raises(ConfigError, match="no images"):
        int8.quantise(onnx.load(exported / "bundle" / "model.onnx"), [])
    assert not (tmp_path / "x").exists()
