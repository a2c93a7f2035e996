"""Reading ONNX files that come from outside: whole in themselves, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sparsifiner_edge.errors import ArtifactError


def read_model(content: bytes, origin: object) -> Any:
    """An ONNX file that holds all of itself, as onnx's ModelProto.

    A model may name other files: weights (external data), or a compiled context (EPContext). Neither a hash nor a
    signature of the model covers those, and ONNX Runtime would read whatever file is named there.

    Args:
        content: the file.
        origin: where it is from, for messages.

    Raises:
        ArtifactError: it is no ONNX file, or needs another file.
    """
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # Protobuf's error, of whichever implementation.
        raise ArtifactError(f"{origin} is no ONNX file: {error}.", "Export the bundle again.") from error
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            named = {entry.key: entry.value for entry in tensor.external_data}
            raise ArtifactError(
                f"{origin} keeps {tensor.name!r} in another file, {named.get('location', '')!r}.",
                "Do not use it, or export it again: a bundle's model holds all of its weights.",
            )
    for node in all_nodes(model):
        if node.op_type == "EPContext":
            raise ArtifactError(f"{origin} has a node {node.name!r} that names other files.", "Do not use it.")
    return model


def _all_tensors(model: Any) -> Iterator[Any]:
    """Every tensor that a model holds: weights, constants, those of subgraphs and functions."""
    yield from _weights(model.graph)
    for node in all_nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _weights(graph)


def _weights(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def all_nodes(model: Any) -> Iterator[Any]:
    """Every node of a model, those of its functions' bodies and of subgraphs (If, Loop) included."""
    yield from _with_inner(model.graph.node)
    for function in model.functions:
        yield from _with_inner(function.node)


def _with_inner(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _with_inner(graph.node)


def subgraphs(node: Any) -> Iterator[Any]:
    """Graphs that a node holds."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)
