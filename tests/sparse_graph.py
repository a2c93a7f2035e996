"""Small graphs with operators of the domain `sparsifiner`, made without torch; and an exported model that merges."""

from __future__ import annotations

from typing import Any

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
MATCH = {"num_heads": HEADS, "num_prefix": 1, "window": 8, "merged": 6}
LEFT_OF_MERGING = 5
"""Kernels of a layer that merges beside MatchTokens and MergeTokens: sizes and places. `test_rtx.py` counts them."""


def sparse_model(batch: int | str = "batch", dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [B,8,8,3] -> 64 tokens -> KeySelect, SparseAttention -> `features` [B,64]."""
    random, kind = np.random.default_rng(0), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {
        "embed": random.normal(0, 0.02, (3, 3 * HEADS * WIDTH)).astype(dtype),
        "place": random.normal(0, 1, (SIDE * SIDE, 3 * HEADS * WIDTH)).astype(dtype),
        "proj_q": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "proj_k": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "single": np.ones((1, SIDE * SIDE), np.float32),
    }
    nodes = [
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
    ]
    between = [
        helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [batch, SIDE * SIDE]),
        helper.make_tensor_value_info("indices", TensorProto.INT32, [batch, HEADS, 4, SELECT["keys"]]),
        helper.make_tensor_value_info("attended", kind, [batch, SIDE * SIDE, HEADS * WIDTH]),
    ]
    bodies = [function_body(name, Structure(merged=False)) for name in ("KeySelect", "SparseAttention")]
    return _model(nodes, weights, between, bodies, batch, kind)


def merging_graph(dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [1,8,8,3] -> qkv and tokens of `dtype` -> MatchTokens, MergeTokens -> `features`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = {
        "embed": np.random.default_rng(0).normal(0, 0.02, (3, 192)).astype(dtype),
        "channels": np.array([64], np.int64),
        "none": np.array([0], np.int64),
        "end": np.array([2], np.int64),
        "sizes": np.ones((1, 64), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["tokens", "embed"], ["qkv"]),
        helper.make_node("Slice", ["qkv", "none", "channels", "end"], ["x"]),
        helper.make_node("MatchTokens", ["qkv", "sizes"], ["pairs"], "merging/match", domain=DOMAIN, **MATCH),
        helper.make_node("MergeTokens", ["x", "sizes", "pairs"], ["fewer"], "merging/merge", domain=DOMAIN),
    ]
    between = [
        helper.make_tensor_value_info("pairs", TensorProto.INT32, [1, 58, 2]),
        helper.make_tensor_value_info("fewer", kind, [1, 58, 64]),
    ]
    bodies = [function_body(name, Structure(prefix=True)) for name in ("MatchTokens", "MergeTokens")]
    return _model(nodes, weights, between, bodies, 1, kind)


def _model(
    nodes: list[Any], weights: dict[str, Any], between: list[Any], bodies: list[Any], batch: int | str, kind: int
) -> onnx.ModelProto:
    """Pixels as "tokens" [B,64,3], these nodes, and the mean over tokens of what the last one gives."""
    weights |= {"pixels": np.array([0, -1, 3], np.int64), "axes": np.array([1], np.int64)}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["cast"], to=kind),
            helper.make_node("Reshape", ["cast", "pixels"], ["tokens"]),
            *nodes,
            helper.make_node("ReduceMean", [nodes[-1].output[0], "axes"], ["features"], keepdims=0),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("features", kind, [batch, HEADS * WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=between,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=bodies)


def merging_model(keep: float = 1.0, merge: Any = (12, 0), depth: int = 2, batch: int | None = None) -> Any:
    """An exported model: 101 tokens, merged behind the attention of all layers but the last, reading `keep` of keys."""
    from sparsifiner_edge.config import SparsityConfig
    from sparsifiner_edge.export.deployed_model import deploy
    from sparsifiner_edge.export.graph import export_graph
    from tests.models import student

    deployed = deploy(student(sparsity=SparsityConfig(keep=keep, cells=4, channels=8, merge=merge), depth=depth))
    return export_graph(deployed, 160, batch, deployed.output_names)
