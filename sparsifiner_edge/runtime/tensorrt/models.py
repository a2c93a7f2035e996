"""Variants of a bundle's model for TensorRT: the same file with its attention carried out in another way."""

from __future__ import annotations

from sparsifiner_edge.ops.bodies import function_body
from sparsifiner_edge.ops.graph import drop_unused
from sparsifiner_edge.ops.schema import DOMAIN


def dense_model(content: bytes) -> bytes:
    """The model with DenseAttention, in standard operators, where it has SparseAttention: for comparison.

    Args:
        content: an ONNX file.
    """
    import onnx

    model = onnx.load_from_string(content)
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, "SparseAttention"):
            continue
        kept = [a for a in node.attribute if a.name in ("num_heads", "scale")]
        made = onnx.helper.make_node("DenseAttention", node.input[:1], node.output, node.name, domain=DOMAIN)
        made.attribute.extend(kept)
        node.CopyFrom(made)
    drop_unused(model)
    if not any(function.name == "DenseAttention" for function in model.functions):
        model.functions.append(function_body("DenseAttention"))
    return bytes(model.SerializeToString())
