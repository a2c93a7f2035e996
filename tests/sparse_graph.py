"""Small graphs with operators of domain `sparsifiner`, built without torch, and an exported model that merges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.schema import DOMAIN, VERSION

HEADS, WIDTH, CHANNELS, SIDE = 2, 32, 8, 8
SELECT = {
    "num_heads": HEADS,
    "num_prefix": 1,
    "query_pool": 4,
    "tile": 16,
    "key_pool": 16,
    "keys": 12,
    "scale": WIDTH**-0.5,
    "value_power": 1.0,
}
ATTEND = {"num_heads": HEADS, "num_prefix": 1, "tile": 16, "key_pool": 16, "scale": WIDTH**-0.5, "prefix_keys": 1}
MATCH = {"num_heads": HEADS, "num_prefix": 1, "window": 8, "merged": 6}
KINDS: dict[type, str] = {np.float32: "float", np.float16: "float16"}
LEFT_OF_MERGING = 5
"""Kernels of a merging layer in addition to MatchTokens and MergeTokens (sizes, places); `test_rtx.py` counts them."""


def sparse_model(batch: int | str = "batch", dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [B,8,8,3] -> 64 tokens -> KeySelect, SparseAttention -> `features` [B,64]."""
    random = np.random.default_rng(0)
    weights = {
        "embed": random.normal(0, 0.02, (3, 3 * HEADS * WIDTH)).astype(dtype),
        "place": random.normal(0, 1, (SIDE * SIDE, 3 * HEADS * WIDTH)).astype(dtype),
        "proj_q": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "proj_k": random.normal(0, 0.3, (HEADS, WIDTH, CHANNELS)).astype(dtype),
        "single": np.ones((1, SIDE * SIDE), np.float32),
    }
    nodes = f"""
        coloured = MatMul (tokens, embed)
        qkv = Add (coloured, place)
        lead = Shape <end = 2> (qkv)
        sizes = Expand (single, lead)
        [select] indices = {DOMAIN}.KeySelect <{_attributes(SELECT)}> (qkv, sizes, proj_q, proj_k)
        [attend] last = {DOMAIN}.SparseAttention <{_attributes(ATTEND)}> (qkv, sizes, indices)"""
    between = f"""float[{batch}, {SIDE * SIDE}] sizes, int32[{batch}, {HEADS}, 4, {SELECT["keys"]}] indices,
        {KINDS[dtype]}[{batch}, {SIDE * SIDE}, {HEADS * WIDTH}] last"""
    bodies = [function_body(name, Structure(merged=False)) for name in ("KeySelect", "SparseAttention")]
    return _model(nodes, weights, between, bodies, batch, dtype)


def merging_graph(dtype: type = np.float32) -> onnx.ModelProto:
    """`image` uint8 [1,8,8,3] -> qkv and tokens of `dtype` -> MatchTokens, MergeTokens -> `features`."""
    weights = {
        "embed": np.random.default_rng(0).normal(0, 0.02, (3, 192)).astype(dtype),
        "channels": np.array([64], np.int64),
        "none": np.array([0], np.int64),
        "end": np.array([2], np.int64),
        "sizes": np.ones((1, 64), np.float32),
    }
    nodes = f"""
        qkv = MatMul (tokens, embed)
        x = Slice (qkv, none, channels, end)
        [match] pairs = {DOMAIN}.MatchTokens <{_attributes(MATCH)}> (qkv, sizes)
        [merge] last = {DOMAIN}.MergeTokens (x, sizes, pairs)"""
    bodies = [function_body(name, Structure(prefix=True)) for name in ("MatchTokens", "MergeTokens")]
    return _model(nodes, weights, f"int32[1, 58, 2] pairs, {KINDS[dtype]}[1, 58, 64] last", bodies, 1, dtype)


def _attributes(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _model(
    nodes: str, weights: dict[str, Any], between: str, bodies: list[Any], batch: int | str, dtype: type
) -> onnx.ModelProto:
    """Build a model: pixels as "tokens" [B,64,3], `nodes`, the mean over tokens of "last"; between: tensor shapes."""
    weights |= {"pixels": np.array([0, -1, 3], np.int64), "axes": np.array([1], np.int64)}
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>
        small (uint8[{batch}, {SIDE}, {SIDE}, 3] image) => ({KINDS[dtype]}[{batch}, {HEADS * WIDTH}] features)
        <{between}> {{
            cast = Cast <to = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}> (image)
            tokens = Reshape (cast, pixels) {nodes}
            features = ReduceMean <keepdims = 0> (last, axes)
        }}""")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model.functions.extend(bodies)
    for node in model.graph.node:
        node.name = node.name and f"layer/{node.name}"
    return model


def merging_model(keep: float = 1.0, merge: Any = (12, 0), depth: int = 2, batch: int | None = None) -> Any:
    """Return an exported model of 101 tokens that merges in all layers but the last and keeps `keep` of the keys."""
    from sparsifiner_edge.config import SparsityConfig
    from sparsifiner_edge.export.deployed_model import deploy
    from sparsifiner_edge.export.graph import export_graph
    from tests.models import student

    deployed = deploy(
        student(sparsity=SparsityConfig(keep=keep, background_tokens=4, channels=8, merge=merge), depth=depth)
    )
    return export_graph(deployed, 160, batch, deployed.output_names)
