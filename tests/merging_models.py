"""Small models whose tokens merge: exported ones, and a graph of the two operators alone, made without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.schema import DOMAIN, VERSION

LEFT_OF_MERGING = 5
"""Kernels of a layer that merges beside MatchTokens and MergeTokens: sizes and places. `test_rtx.py` counts them."""


def merging_model(keep: float = 1.0, merge: Any = (12, 0), depth: int = 2, batch: int | None = None) -> Any:
    """An exported model: 101 tokens, merged behind the attention of all layers but the last, reading `keep` of keys."""
    from sparsifiner_edge.config import SparsityConfig
    from sparsifiner_edge.export.deployed_model import deploy
    from sparsifiner_edge.export.graph import export_graph
    from tests.models import student

    deployed = deploy(student(sparsity=SparsityConfig(keep=keep, cells=4, channels=8, merge=merge), depth=depth))
    return export_graph(deployed, 160, batch, deployed.output_names)


def merging_graph(dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [1,8,8,3] -> qkv and tokens of `dtype` -> MatchTokens, MergeTokens -> `features`."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    random = np.random.default_rng(0)
    weights = {
        "pixels": np.array([0, -1, 3], np.int64),
        "embed": random.normal(0, 0.02, (3, 192)).astype(dtype),
        "axes": np.array([1], np.int64),
        "channels": np.array([64], np.int64),
        "none": np.array([0], np.int64),
        "last": np.array([2], np.int64),
        "sizes": np.ones((1, 64), np.float32),
    }
    settings = {"num_heads": 2, "num_prefix": 1, "window": 8, "merged": 6}
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=kind),
        helper.make_node("Reshape", ["cast", "pixels"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "embed"], ["qkv"]),
        helper.make_node("Slice", ["qkv", "none", "channels", "last"], ["x"]),
        helper.make_node("MatchTokens", ["qkv", "sizes"], ["pairs"], "merging/match", domain=DOMAIN, **settings),
        helper.make_node("MergeTokens", ["x", "sizes", "pairs"], ["fewer"], "merging/merge", domain=DOMAIN),
        helper.make_node("ReduceMean", ["fewer", "axes"], ["features"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "merging",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 8, 8, 3])],
        [helper.make_tensor_value_info("features", kind, [1, 64])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[
            helper.make_tensor_value_info("pairs", TensorProto.INT32, [1, 58, 2]),
            helper.make_tensor_value_info("fewer", kind, [1, 58, 64]),
        ],
    )
    return helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_body(name, Structure(prefix=True)) for name in ("MatchTokens", "MergeTokens")],
    )
