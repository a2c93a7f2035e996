"""Tests that function bodies use only operators and types documented for TensorRT's parser.

Source: "Supported ONNX Operators" of onnx/onnx-tensorrt, docs/operators.md at 10.1-GA, the newest public version up to
JetPack 6's 10.3: types, and which inputs must be constant.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import pytest
from onnx import TensorProto, helper

from sparsifiner_edge.ops.schema import OPERATORS, TOPK_LIMIT
from tests.ops.matrix import PAPER, Case, body_model, cases

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
NUMBERS = FLOATS | {TensorProto.INT32, TensorProto.INT64}
TRUTHS = {TensorProto.BOOL}
OF_FLOATS = "Log LogSoftmax MatMul Softmax Sqrt"
OF_NUMBERS = (
    "Abs Add ArgMax Div Equal Greater IsNaN Less LessOrEqual Max Min Mul Pad Range ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ScatterElements Sub TopK"
)
OF_ALL = (
    "Cast CastLike Concat Constant Expand Gather GatherElements Identity Reshape Shape Slice Squeeze Transpose "
    "Unsqueeze Where"
)
OF_TRUTHS = "And Not Or"
KNOWN: dict[str, set[Any]] = {
    name: types
    for names, types in ((OF_FLOATS, FLOATS), (OF_NUMBERS, NUMBERS), (OF_ALL, NUMBERS | TRUTHS), (OF_TRUTHS, TRUTHS))
    for name in names.split()
}
CONSTANT = {
    "Pad": 3,
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceProd": 1,
    "ReduceSum": 1,
    "Slice": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
"""Index of the axes input, which must be constant."""


def inlined(case: Case) -> onnx.ModelProto:
    """Return a model with the function body inlined and a type for every tensor."""
    model = onnx.load_from_string(body_model(case, case.inputs()))
    return onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_tensorrt_takes_what_is_in_the_bodies(name: str) -> None:
    for dtype in ("float32", "float16"):
        for case in [*cases(name), *PAPER * (name == "SparseAttention")]:
            model = inlined(dataclasses.replace(case, dtype=dtype))
            values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
            types = {value.name: value.type.tensor_type.elem_type for value in values}
            constants = {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
            for node in model.graph.node:
                assert node.op_type in KNOWN, f"{case}: {node.op_type}"
                for tensor in filter(None, node.input):
                    assert types[tensor] in KNOWN[node.op_type], (case, node)
                axes = CONSTANT.get(node.op_type)
                if axes is not None and len(node.input) > axes:
                    assert node.input[axes] in constants, (case, node)
                settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                if node.op_type == "TopK":
                    assert settings.get("sorted", 1) == 1
                if node.op_type == "Cast":
                    assert settings["to"] in KNOWN["Cast"]
            if "keys" in case.attributes:
                assert case.attributes["keys"] < TOPK_LIMIT
