"""Where sparse attention pays on this machine: measured, operator by operator, before a file is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.entries import LayerChoice, Measured
from sparsifiner_edge.export.graph import IR_VERSION
from sparsifiner_edge.export.sessions import file_session
from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.kernels import NATIVE, described
from sparsifiner_edge.ops.schema import DOMAIN, VERSION, AttributeValue
from sparsifiner_edge.runtime.onnxruntime.session import native_library
from sparsifiner_edge.sparse.attention import SparseAttention, restore_dense
from sparsifiner_edge.sparse.calibrate import sparse_layers

ROUNDS, RUNS = 7, 5


def keep_dense_where_slower(model: Any) -> Measured:
    """Turn sparse layers of a model, in place, into dense ones where sparse attention is slower on this machine.

    Both run on the kernels that a session would use here, with the layer's own sizes, selection and cells included, one
    image at a time, in turn; medians decide. Layers of equal sizes are measured once.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, SparseAttention]]] = {}
    for number, block in enumerate(model.blocks):
        layer = block.attn
        if isinstance(layer, SparseAttention):
            key = (layer.num_heads, layer.head_dim, layer.num_prefix, layer.layout, layer.sparsity)
            groups.setdefault(key, []).append((number, layer))
    choices = []
    for members in groups.values():
        sparse, dense = _measure(members[0][1])
        slower = sparse > dense
        for _, layer in members if slower else ():
            restore_dense(layer)
        choices.append(LayerChoice(tuple(number for number, _ in members), sparse, dense, slower))
    kernels = described(NATIVE.operators, native_library("auto") is not None)
    return Measured(kernels, tuple(choices), len(sparse_layers(model)))


def _measure(layer: SparseAttention) -> tuple[float, float]:
    """Median milliseconds of a layer's selection and sparse attention, and of dense attention."""
    layout, sparsity = layer.layout, layer.sparsity
    random = np.random.default_rng(0)
    heads, width = layer.num_heads, layer.head_dim
    tokens = layout.patches + layer.num_prefix
    qkv = random.normal(size=(1, tokens, 3 * heads * width)).astype(np.float32)
    inputs = {"qkv": qkv}
    shared = {"num_heads": heads, "scale": layer.scale}
    if sparsity.preset == "paper":
        names = ["proj_q", "bias_q", "proj_k", "bias_k", "down", "up"]
        inputs |= dict(zip(names, (x.detach().numpy() for x in layer.select.inputs()), strict=True))  # type: ignore[operator]
        choose = _node(
            "LandmarkKeySelect", ["qkv", *names], "lists", num_heads=heads, keys=layout.keys, scale=heads**-0.5,
            top_coefficients=sparsity.top_coefficients, basis_threshold=sparsity.basis_threshold,
        )  # fmt: skip
        tile, cell, prefix_keys = 1, 0, 0
    else:
        inputs |= {n: random.normal(size=(heads, width, sparsity.channels)).astype(np.float32) for n in ("a", "b")}
        choose = _node(
            "KeySelect", ["qkv", "a", "b"], "lists", num_prefix=layer.num_prefix, probe=sparsity.probe,
            tile=sparsity.tile, cell=layout.cell, keys=layout.keys, value_power=sparsity.value_power, **shared,
        )  # fmt: skip
        tile, cell, prefix_keys = sparsity.tile, layout.cell, 1
    lists = {"tile": tile, "cell": cell, "prefix_keys": prefix_keys, "num_prefix": layer.num_prefix}
    attend = _node("SparseAttention", ["qkv", "lists"], "output", **lists, **shared)
    dense = _node("DenseAttention", ["qkv"], "output", **shared)
    structure = Structure(layer.num_prefix > 0, cell > 0, bool(prefix_keys))
    runs = [_runner([choose, attend], inputs, structure), _runner([dense], {"qkv": qkv}, structure)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for run, taken in zip(runs, times, strict=True):
            run()  # the other's threads may still spin
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                run()
                taken.append((time.perf_counter_ns() - start) / 1e6)
    return statistics.median(times[0]), statistics.median(times[1])


def _node(kind: str, inputs: list[str], output: str, **attributes: AttributeValue) -> onnx.NodeProto:
    node = helper.make_node(kind, inputs, [output], domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def _runner(nodes: list[onnx.NodeProto], inputs: dict[str, Array], structure: Structure) -> Callable[[], Any]:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in inputs.items()]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(nodes, "layer", values, [output]),
        functions=[function_body(node.op_type, structure) for node in nodes],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )
    session = file_session(model)
    return lambda: session.run(None, inputs)
