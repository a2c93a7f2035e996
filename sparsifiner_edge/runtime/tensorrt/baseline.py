"""Dense and unmerged variants of a bundle's own file, with which a sparse engine is compared when it is built."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparsifiner_edge.ops.bodies import Structure, function_body
from sparsifiner_edge.ops.carried import Carried, carried_along
from sparsifiner_edge.ops.graph import has_sizes, tidy
from sparsifiner_edge.ops.schema import DOMAIN

_SPARSE = "SparseAttention"
"""Operator that is replaced."""
_DENSE = "DenseAttention"
"""Operator that replaces it."""


def dense_model(model: onnx.ModelProto, layers: Collection[str] | None = None) -> onnx.ModelProto:
    """Replace sparse attention with dense attention, as ONNX function bodies of standard operators.

    Token merging stays as it is.

    Args:
        model: Model to change in place.
        layers: Names of the nodes to replace; None replaces all.

    Returns:
        The model.
    """
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == _SPARSE and (layers is None or node.name in layers):
            attributes = [a for a in node.attribute if a.name in ("num_heads", "scale")]
            replacement = helper.make_node(_DENSE, node.input[:2], node.output, node.name, domain=DOMAIN)
            replacement.attribute.extend(attributes)
            node.CopyFrom(replacement)
    tidy(model)
    dense = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == _DENSE]
    for function in [function for function in model.functions if function.name == _DENSE]:
        model.functions.remove(function)
    if dense:
        merged = any(has_sizes(model, node) for node in dense)
        model.functions.append(function_body(_DENSE, Structure(merged=merged)))
    return model


def unmerged_model(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Remove token merging and replace sparse attention with dense attention.

    Args:
        model: Model to change in place.

    Returns:
        The model, or None if the file does not have the form that this package exports.
    """
    replaced, carried = dict[str, str](), carried_along(model)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    if not carried or carried[0].match.input[0] not in sizes:
        return None
    _widen(model.graph, carried, sizes[carried[0].match.input[0]][1].dim_value)
    for along in carried:
        replaced[along.merge.output[0]] = along.merge.input[0]
        replaced |= {along.sizes: along.match.input[1]} if along.sizes else {}
        replaced |= dict([along.positions] if along.positions else [])
        _read_unmerged(model.graph, along.places)
    for node in model.graph.node:
        for place in range(len(node.input)):
            while node.input[place] in replaced:
                node.input[place] = replaced[node.input[place]]
    tidy(model)
    del model.graph.value_info[:]  # These shapes are for the smaller number of tokens.
    merges = any(node.domain == DOMAIN and node.op_type in ("MatchTokens", "MergeTokens") for node in model.graph.node)
    return None if merges else dense_model(model)


def _widen(graph: Any, carried: Sequence[Carried], total: int) -> None:
    """Adapt constant shapes of Reshape nodes to a model without merging.

    After a merge layer, such a shape contains the number of tokens that are left. It is replaced with the total number.

    Args:
        graph: Graph to change in place.
        carried: Merge layers of the graph, in order.
        total: Number of tokens before the first merge layer.
    """
    merged = {along.merge.name: _integer(along.match, "merged") for along in carried}
    prefix, tokens = _integer(carried[0].match, "num_prefix"), total
    numbers = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT64]
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in numbers}
    for node in graph.node:
        tokens -= merged.get(node.name, 0)
        if node.op_type == "Reshape" and node.input[1] in shapes and tokens != total:
            shape = shapes[node.input[1]].tolist()
            at = next((n for n, size in enumerate(shape) if n and size in (tokens, tokens - prefix)), None)
            if at is not None:
                shape[at] += total - tokens
                node.input[1] = f"{node.input[1]} of all of {node.output[0]}"
                graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), node.input[1]))


def _integer(node: Any, name: str) -> int:
    """Return an integer attribute of a node."""
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _read_unmerged(graph: Any, places: str | None) -> None:
    """Replace reads of merged tokens with reads of all tokens.

    To restore all patches in raster order after merging, the file reads rows at `places`, the token index of each patch
    (`ops.torch.rows_at`). Without merging all tokens exist, so that one Gather returns them in raster order.

    Args:
        graph: Graph to change in place.
        places: Name of the tensor with the token index of each patch; None if nothing reads it.
    """
    producers = {name: node for node in graph.node for name in node.output}

    def read_by(name: str) -> Any:
        """Return the first node that reads a tensor, or an empty node."""
        return next((node for node in graph.node if name in node.input), onnx.NodeProto())

    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] != places:
            continue
        name = node.output[0]
        while (reader := read_by(name)).op_type in ("Add", "Reshape") or list(reader.input[:1]) == [name]:
            name = reader.output[0]
        if reader.op_type != "Gather":
            continue
        rows, last = producers.get(reader.input[0], onnx.NodeProto()), read_by(reader.output[0])
        if (rows.op_type, last.op_type) in (("Reshape", "Reshape"), ("Gather", "Unsqueeze")):  # The second for batch 1.
            gather = helper.make_node("Gather", [rows.input[0], node.input[1]], last.output, last.name, axis=1)
            last.CopyFrom(gather)
