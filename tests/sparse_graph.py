"""A small graph with one layer of sparse attention, made without torch."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.schema import DOMAIN, VERSION

HEADS, WIDTH, CHANNELS, SIDE = 2, 32, 8, 8
SELECT = {
    "num_heads": HEADS, "num_prefix": 1, "probe": 4, "tile": 16, "cell": 16, "keys": 12, "scale": WIDTH**-0.5,
    "value_power": 1.0,
}  # fmt: skip
ATTEND = {"num_heads": HEADS, "num_prefix": 1, "tile": 16, "cell": 16, "scale": WIDTH**-0.5, "prefix_keys": 1}


def sparse_model(batch: int | str = "batch", dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [B,8,8,3] -> 64 tokens -> KeySelect, SparseAttention -> `features` [B,64]."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    random = np.random.default_rng(0)
    weights = {
        "pixels": np.array([0, -1, 3], np.int64),
        "embed": random.normal(0, 0.02, (3, 3 * HEADS * WIDTH)).astype(dtype),
        "place": random.normal(0, 1, (SIDE * SIDE, 3 * HEADS * WIDTH)).astype(dtype),
        "proj_q": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "proj_k": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "axes": np.array([1], np.int64),
        "single": np.ones((1, SIDE * SIDE), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=kind),
        helper.make_node("Reshape", ["cast", "pixels"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "embed"], ["coloured"]),
        helper.make_node("Add", ["coloured", "place"], ["qkv"]),
        helper.make_node("Shape", ["qkv"], ["lead"], end=2),
        helper.make_node("Expand", ["single", "lead"], ["sizes"]),
        helper.make_node(
            "KeySelect", ["qkv", "sizes", "proj_q", "proj_k"], ["indices"], "layer/select", domain=DOMAIN, **SELECT
        ),
        helper.make_node(
            "SparseAttention", ["qkv", "sizes", "indices"], ["attended"], "layer/attend", domain=DOMAIN, **ATTEND
        ),
        helper.make_node("ReduceMean", ["attended", "axes"], ["features"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "sparse",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("features", kind, [batch, HEADS * WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[
            helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [batch, SIDE * SIDE]),
            helper.make_tensor_value_info("indices", TensorProto.INT32, [batch, HEADS, 4, SELECT["keys"]]),
            helper.make_tensor_value_info("attended", kind, [batch, SIDE * SIDE, HEADS * WIDTH]),
        ],
    )
    structure = Structure(merged=False)
    return helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_body(name, structure) for name in ("KeySelect", "SparseAttention")],
    )
