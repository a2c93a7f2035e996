"""Variants of a bundle's model for TensorRT: the same file with its attention carried out in another way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparsifiner_edge.ops.bodies import function_body
from sparsifiner_edge.ops.schema import DOMAIN


def own_nodes(model: Any, *names: str) -> list[Any]:
    """Nodes of the graph that are operators of ours, of these names."""
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in names]


def dense_model(content: bytes) -> bytes:
    """The model with DenseAttention, in standard operators, where it has SparseAttention: for comparison.

    Args:
        content: an ONNX file.
    """
    import onnx

    model = onnx.load_from_string(content)
    for node in own_nodes(model, "SparseAttention"):
        kept = [a for a in node.attribute if a.name in ("num_heads", "scale")]
        made = onnx.helper.make_node("DenseAttention", node.input[:1], node.output, node.name, domain=DOMAIN)
        made.attribute.extend(kept)
        node.CopyFrom(made)
    drop_unused(model)
    if not any(function.name == "DenseAttention" for function in model.functions):
        model.functions.append(function_body("DenseAttention"))
    return bytes(model.SerializeToString())


def drop_unused(model: Any) -> None:
    """Remove nodes whose outputs nobody reads, then weights and functions that nobody uses."""
    graph = model.graph
    while True:
        read = {name for node in graph.node for name in _read_by(node)} | {value.name for value in graph.output}
        unused = [node for node in graph.node if not read.intersection(node.output)]
        for node in unused:
            graph.node.remove(node)
        if not unused:
            break
    _keep(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in read))
    used = {node.op_type for node in graph.node if node.domain == DOMAIN}
    _keep(model.functions, (f for f in model.functions if f.domain != DOMAIN or f.name in used))


def _read_by(node: Any) -> Iterable[str]:
    """Inputs of a node and of everything in its subgraphs (If, Loop)."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (value.name for value in graph.output)


def _keep(field: Any, entries: Iterable[Any]) -> None:
    kept = list(entries)
    del field[:]
    field.extend(kept)
