"""Tidying the graph of an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sparsifiner_edge.ops.schema import DOMAIN


def drop_unused(model: Any) -> None:
    """Remove nodes whose outputs nobody reads, then weights and functions of ours that nobody uses."""
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


def _read_by(node: Any) -> Iterator[str]:
    """Inputs of a node and of everything in its subgraphs."""
    yield from node.input
    for graph in (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)):
        for inner in graph.node:
            yield from _read_by(inner)
        yield from (value.name for value in graph.output)


def _keep(field: Any, entries: Iterable[Any]) -> None:
    kept = list(entries)
    del field[:]
    field.extend(kept)
