"""Removal of unused parts from the graph of an ONNX model, and the check for merged token sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS


def drop_unread(nodes: Any, outputs: Iterable[str]) -> set[str]:
    """Remove the nodes whose outputs are unused from the nodes of a graph or function.

    Args:
        nodes: Nodes of the graph or function; modified in place.
        outputs: Names of the outputs of the graph or function.

    Returns:
        Names of all tensors that the remaining nodes read, and `outputs`.
    """
    while True:
        read = {name for node in nodes for name in _read_by(node)} | set(outputs)
        unread = [node for node in nodes if not read.intersection(node.output)]
        if not unread:
            return read
        for node in unread:
            nodes.remove(node)


def tidy(model: Any) -> None:
    """Remove unused nodes, then unused weights and unused functions of the `sparsifiner` domain."""
    graph = model.graph
    read = drop_unread(graph.node, [value.name for value in graph.output])
    _keep(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in read))
    used = {node.op_type for node in graph.node if node.domain == DOMAIN}
    _keep(model.functions, (f for f in model.functions if f.domain != DOMAIN or f.name in used))


def has_sizes(model: Any, node: Any) -> bool:
    """Return True if the `sizes` input of a `sparsifiner` node may differ from 1, that is, if tokens were merged."""
    import onnx

    if len(node.input) < 2 or OPERATORS[node.op_type].inputs[1].name != "sizes":
        return False
    name = node.input[1]
    expanded = {other.output[0]: other.input[0] for other in model.graph.node if other.op_type == "Expand"}
    weight = next((t for t in model.graph.initializer if t.name == expanded.get(name, name)), None)
    return weight is None or not bool((onnx.numpy_helper.to_array(weight) == 1).all())


def _read_by(node: Any) -> Iterator[str]:
    """Yield the names that a node and its subgraphs read, including the outputs of the subgraphs."""
    yield from node.input
    for graph in (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)):
        for inner in graph.node:
            yield from _read_by(inner)
        yield from (value.name for value in graph.output)


def _keep(field: Any, entries: Iterable[Any]) -> None:
    """Replace the content of a repeated protobuf field."""
    entries = list(entries)
    del field[:]
    field.extend(entries)
