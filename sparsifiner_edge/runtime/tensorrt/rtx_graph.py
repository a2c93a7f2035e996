"""What TensorRT-RTX cannot take in an ONNX file: rejected by name before its parser, or written otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.onnx_file import all_nodes

if TYPE_CHECKING:
    import onnx

STANDARD_DOMAINS = ("", "ai.onnx")
_REFUSED = {
    **dict.fromkeys(("NonZero", "Compress", "Unique"), "its number of results depends on the data"),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift"), "it has no bitwise operators"),
    **dict.fromkeys(
        ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"),
        "int8 reaches it through QuantizeLinear and DequantizeLinear alone",
    ),
}
"""Operator -> why; found with TensorRT-RTX 1.7."""


def check_operators(model: onnx.ModelProto) -> None:
    """Reject what TensorRT-RTX's parser would reject less clearly, or abort on, bodies and branches included.

    Raises:
        BackendError: names every such node, with the reason.
    """
    functions = {(f.domain, f.name) for f in model.functions}
    types = {t.name: t.data_type for t in model.graph.initializer}
    problems = [
        f"{node.op_type} ({node.name or next(iter(node.output), 'without a name')}): {reason}"
        for node in all_nodes(model)
        if (reason := _reason(node, functions, types))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BackendError(
            f"TensorRT-RTX cannot take this file. {'; '.join(problems[:5])}{more}.",
            "Run it with --backend onnxruntime, or export the model again with this version.",
        )


def _reason(node: onnx.NodeProto, functions: set[tuple[str, str]], types: dict[str, int]) -> str | None:
    if node.domain not in STANDARD_DOMAINS:
        if (node.domain, node.op_type) in functions:
            return None
        return f"an operator of the domain {node.domain!r} without a function body in the file"
    if node.op_type.startswith("Scatter"):
        reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        return f"it cannot scatter with reduction {reduction!r}" if reduction != "none" else None
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
        from onnx import TensorProto

        if types.get(node.input[2]) == TensorProto.UINT8:
            return "uint8 quantisation, where it takes int8 with zero point 0 (export with --recipe tensorrt)"
    return _REFUSED.get(node.op_type)


def without_single_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """For Turing, where TensorRT-RTX compiles no product of float32 matrices: those inside the operators' bodies, in a
    float16 file, become sums of elementwise products.

        MatMul (a [.., n, k], b [.., k, m])  ->  ReduceSum over k of a [.., n, 1, k] * b^T [.., 1, m, k]

    Returns:
        The file with its bodies inlined.
    """
    import numpy as np
    import onnx
    import onnx.inliner

    flat = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model), data_prop=True)
    values = [*flat.graph.value_info, *flat.graph.input, *flat.graph.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in flat.graph.initializer
    }
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values}
    ranks |= {t.name: len(t.dims) for t in flat.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in flat.graph.node:
        single = node.op_type == "MatMul" and types[node.input[0]] == onnx.TensorProto.FLOAT
        nodes += _as_sum(node, ranks[node.input[1]]) if single else [node]
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    for axis, name in _AXES.items():
        flat.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), name))
    return flat


_AXES = {-1: "turing_last", -2: "turing_second", -3: "turing_third"}


def _as_sum(node: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    from onnx import helper

    def step(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes)

    (left, right), result = node.input, node.output[0]
    turned = [*range(rank - 2), rank - 1, rank - 2]
    return [
        step("Unsqueeze", [left, _AXES[-2]], f"{result}_rows"),
        step("Transpose", [right], f"{result}_turned", perm=turned),
        step("Unsqueeze", [f"{result}_turned", _AXES[-3]], f"{result}_columns"),
        step("Mul", [f"{result}_rows", f"{result}_columns"], f"{result}_products"),
        step("ReduceSum", [f"{result}_products", _AXES[-1]], result, keepdims=0),
    ]
