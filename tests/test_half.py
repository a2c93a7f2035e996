"""float16 exports: what stays float32, how close they are, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import BackendError, GateError
from sparsifiner_edge.export import fp16 as module
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.fp16 import convert, to_fp16
from sparsifiner_edge.export.graph import export_graph
from sparsifiner_edge.export.sessions import file_runner
from sparsifiner_edge.metrics import aligned, cosine
from sparsifiner_edge.ops.schema import OPERATORS
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.sparse.student import save_student
from tests.commands import manifest_of
from tests.models import TINY_CONFIG, student
from tests.once import Once

KINDS = {
    "edge": TINY_CONFIG,
    "no cells": SparsityConfig(keep=0.2, cells=0, channels=8),
    "paper": SparsityConfig.for_preset("paper", keep=0.25),
    "pruned": SparsityConfig(keep=0.2, cells=4, channels=8, token_keep=((0, 0.7),)),
    "dense": SparsityConfig(keep=1),
}


@functools.cache
def _file(kind: str) -> bytes:
    deployed = deploy(student(sparsity=KINDS[kind], depth=2), tokens=True)
    return export_graph(deployed, 160, 1, deployed.output_names).SerializeToString()


def small_file(kind: str) -> onnx.ModelProto:
    """An exported float32 file of two layers."""
    return onnx.load_from_string(_file(kind))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of the graph, bodies' results included."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in model.graph.initializer
    }


@pytest.fixture(scope="module")
def place(once: Once) -> Path:
    def make(folder: Path) -> None:
        save_student(student(), folder / "student")
        export_bundle(folder / "student", folder / "fp16", precision="fp16", batch="dynamic", tokens=True)

    return once("half", make)


@pytest.mark.parametrize("kind", KINDS)
def test_islands_stay_float32_and_the_rest_does_not(kind: str) -> None:
    model, counts, _ = convert(small_file(kind))
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    for node in model.graph.node:
        floats = {types[name] for name in node.input if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        if node.op_type in ("LayerNormalization", "Softmax", "Conv", "TopK"):
            assert floats <= {TensorProto.FLOAT}, node  # TopK also sorts indices.
        if node.domain == "sparsifiner":  # Sizes alone are float32 by their schema.
            for name, tensor in zip(node.input, OPERATORS[node.op_type].inputs, strict=True):
                own = {("float32",): TensorProto.FLOAT, ("int32",): TensorProto.INT32}
                assert types[name] == own.get(tensor.dtypes, TensorProto.FLOAT16), node
        if node.op_type in ("MatMul", "Gemm", "Gelu"):
            assert floats == {TensorProto.FLOAT16}, node
    assert {types[o.name] for o in model.graph.output} <= {TensorProto.FLOAT, TensorProto.INT32}
    assert counts[TensorProto.FLOAT16] > counts[TensorProto.FLOAT] > 0
    assert model.graph.node[0].op_type == "Cast"
    assert len(model.SerializeToString()) < 0.75 * len(small_file(kind).SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_close_to_float32_on_another_image(kind: str) -> None:
    single = small_file(kind)
    half, found = to_fp16(single, [smooth_images(160)])
    assert min(found.least_row_cosines.values()) >= module.LEAST_ROW_COSINE
    image = smooth_images(160, seed=9)
    wanted = file_runner(single)(image)
    outputs, lost = aligned(file_runner(half)(image), wanted)
    assert lost <= 2
    assert {value.dtype for value in outputs.values()} == {np.dtype(np.float32)}
    assert all(cosine(value, wanted[name]).min() > 0.999 for name, value in outputs.items())
    assert any(not np.array_equal(value, wanted[name]) for name, value in outputs.items())


def test_a_bundle_says_what_it_is_and_what_ran(place: Path) -> None:
    manifest = manifest_of(place / "fp16")
    assert manifest["precision"] == "fp16"
    assert set(manifest["tolerances"].values()) == {0.05}
    assert {o["dtype"] for o in manifest["outputs"]} == {"float32"}
    found = manifest["float16"]
    assert min(found["least_row_cosines"].values()) >= 0.999
    assert set(found["least_row_cosines"]) == {"logits", "features", "tokens"}
    with open_session(place / "fp16") as session:
        check_golden(session, open_bundle(place / "fp16"))
        assert session.description.precision == "fp16"
        assert session.description.kernels == "function bodies"
        together = session.infer({"image": smooth_images(160, 3)})["logits"]
        alone = session.infer({"image": smooth_images(160, 3)[1:2]})["logits"]
    np.testing.assert_allclose(together[1:2], alone, atol=2e-2 * np.ptp(alone))
    with pytest.raises(BackendError, match="native kernels take no float16"):
        open_session(place / "fp16", kernels="native")


def scaled(model: onnx.ModelProto, place: int, largest: float) -> str:
    """The name of a linear layer's weights, scaled so that their largest is this."""
    weights = {t.name: t for t in model.graph.initializer}
    tensor = [weights[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights][place]
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values * (largest / np.abs(values).max()), tensor.name))
    return tensor.name


def test_what_float16_cannot_hold_or_is_too_far_is_a_failed_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_file("dense"), [smooth_images(160)]
    scaled(model, -2, 10)  # The weights fit; what they make does not.
    scaled(model, -1, 6e4)
    with pytest.raises(GateError, match=r"Activations of '\w+' reach \d\.\d+e\+0\d, beyond float16"):
        to_fp16(model, images)
    with pytest.raises(GateError, match=f"Weight '{scaled(model, 0, 7e4)}' holds 70000, beyond float16"):
        to_fp16(model, images)
    monkeypatch.setattr(module, "LEAST_ROW_COSINE", 1.1)
    with pytest.raises(GateError, match=r"float16 file has cosine \d\.\d+ to float32, allowed 1.1") as caught:
        to_fp16(small_file("dense"), images)
    assert caught.value.fix == "Nothing was written. Export fp32, or int8."
