"""Tidying the graph of an ONNX file, and what it says of the tokens' sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS


def drop_unread(nodes: Any, outputs: Iterable[str]) -> set[str]:
    """Remove, of a graph's or function's nodes, those whose outputs are unused; returns what is read."""
    while True:
        read = {name for node in nodes for name in _read_by(node)} | set(outputs)
        unread = [node for node in nodes if not read.intersection(node.output)]
        if not unread:
            return read
        for node in unread:
            nodes.remove(node)


def tidy(model: Any) -> None:
    """Remove nodes whose outputs are unused, then unused weights and functions of ours."""
    graph = model.graph
    read = drop_unread(graph.node, [value.name for value in graph.output])
    _keep(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in read))
    used = {node.op_type for node in graph.node if node.domain == DOMAIN}
    _keep(model.functions, (f for f in model.functions if f.domain != DOMAIN or f.name in used))


def has_sizes(model: Any, node: Any) -> bool:
    """Whether a node of ours may get sizes other than ones, as the second input: some tokens were merged."""
    import onnx

    if len(node.input) < 2 or OPERATORS[node.op_type].inputs[1].name != "sizes":
        return False
    name = node.input[1]
    expanded = {each.output[0]: each.input[0] for each in model.graph.node if each.op_type == "Expand"}
    weight = next((t for t in model.graph.initializer if t.name == expanded.get(name, name)), None)
    return weight is None or not bool((onnx.numpy_helper.to_array(weight) == 1).all())


def _read_by(node: Any) -> Iterator[str]:
    """Inputs of a node and of everything in its subgraphs."""
    yield from node.input
    for graph in (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)):
        for inner in graph.node:
            yield from _read_by(inner)
        yield from (value.name for value in graph.output)


def _keep(field: Any, entries: Iterable[Any]) -> None:
    entries = list(entries)
    del field[:]
    field.extend(entries)
