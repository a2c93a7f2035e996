"""What a sparse model is held against where an engine is built: files made of its own, with its own weights."""

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

_SPARSE, _DENSE = "SparseAttention", "DenseAttention"


def dense_model(model: onnx.ModelProto, layers: Collection[str] | None = None) -> onnx.ModelProto:
    """A file, changed in place: dense attention in standard operators where it had sparse, in all layers or those whose
    nodes are named; tokens merge as they did.
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
    """The dense model whose tokens a file merges, changed in place; None where the file is not as this package exports
    it.
    """
    instead, carried = dict[str, str](), carried_along(model)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    if not carried or carried[0].match.input[0] not in sizes:
        return None
    _widen(model.graph, carried, sizes[carried[0].match.input[0]][1].dim_value)
    for along in carried:
        instead[along.merge.output[0]] = along.merge.input[0]
        instead |= {along.sizes: along.match.input[1]} if along.sizes else {}
        instead |= dict([along.positions] if along.positions else [])
        _leave_whole(model.graph, along.places)
    for node in model.graph.node:
        for place in range(len(node.input)):
            while node.input[place] in instead:
                node.input[place] = instead[node.input[place]]
    tidy(model)
    del model.graph.value_info[:]  # Of fewer tokens.
    merges = any(node.domain == DOMAIN and node.op_type in ("MatchTokens", "MergeTokens") for node in model.graph.node)
    return None if merges else dense_model(model)


def _widen(graph: Any, carried: Sequence[Carried], whole: int) -> None:
    """Reshapes behind tokens that merge have the number of those left as a constant: let them have that of all."""
    merged = {along.merge.name: _integer(along.match, "merged") for along in carried}
    prefix, tokens = _integer(carried[0].match, "num_prefix"), whole
    numbers = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT64]
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in numbers}
    for node in graph.node:
        tokens -= merged.get(node.name, 0)
        if node.op_type == "Reshape" and node.input[1] in shapes and tokens != whole:
            shape = shapes[node.input[1]].tolist()
            at = next((n for n, size in enumerate(shape) if n and size in (tokens, tokens - prefix)), None)
            if at is not None:
                shape[at] += whole - tokens
                node.input[1] = f"{node.input[1]} of all of {node.output[0]}"
                graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), node.input[1]))


def _integer(node: Any, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _leave_whole(graph: Any, places: str | None) -> None:
    """Where rows of tokens are read at the `places` of all patches, in raster order (`ops.torch.rows_at`), the tokens
    are all there: one gather has them in that order.
    """
    producers = {name: node for node in graph.node for name in node.output}

    def read_by(name: str) -> Any:
        return next((node for node in graph.node if name in node.input), onnx.NodeProto())

    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] != places:
            continue
        name = node.output[0]
        while (reader := read_by(name)).op_type in ("Add", "Reshape"):
            name = reader.output[0]
        if reader.op_type != "Gather":
            continue
        rows, whole = producers.get(reader.input[0], onnx.NodeProto()), read_by(reader.output[0])
        if (rows.op_type, whole.op_type) == ("Reshape", "Reshape"):
            gather = helper.make_node("Gather", [rows.input[0], node.input[1]], whole.output, whole.name, axis=1)
            whole.CopyFrom(gather)
