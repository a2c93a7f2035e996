"""Which layer of a vision transformer, and which part of it, a node of its ONNX graph belongs to.

The exported file's nodes are named by their module, such as "blocks.3.mlp.fc1.MatMul" (`export.graph`): layer 3, mlp.
What a quantiser or a change of types put between them belongs to what reads it.
Imports onnx, so that measuring alone needs none of this.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import onnx

from sparsifiner_edge.ops.schema import DOMAIN

_PROJECTIONS = ("qkv", "proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate")
_BETWEEN = ("QuantizeLinear", "DequantizeLinear", "Cast")
_INLINED = "_inlfunc_"
"""How ONNX Runtime names the nodes of a function body: "_inlfunc_KeySelect_token_3_KeySelect/top"."""
_SCOPE = re.compile(r"(?:model\.)?blocks\.(\d+)\.(?:(.*)\.)?[^.]*")


class Place(NamedTuple):
    """Where a node belongs.

    Attributes:
        layer: from 0; None outside the layers.
        kind: one of `layers.LAYER_KINDS`.
        name: of the node in the exported file.
        function: the operator of the domain `sparsifiner` that it is; "" for standard operators.
    """

    layer: int | None
    kind: str
    name: str
    function: str = ""


class Places(NamedTuple):
    """Places of an exported file's nodes: by node name and by output tensor."""

    nodes: dict[str, Place]
    tensors: dict[str, Place]


def find_places(model: onnx.ModelProto) -> Places:
    """Places of every node of an exported file."""
    places = Places({}, {})
    readers: dict[str, Place] = {}
    for node in reversed(model.graph.node):  # Backwards: what is between two is its reader's.
        place = _place_of(node)
        if node.op_type in _BETWEEN and place.layer is None:
            reader = next((readers[tensor] for tensor in node.output if tensor in readers), place)
            place = reader._replace(name=place.name)
        readers.update(dict.fromkeys(filter(None, node.input), place))
        places.tensors.update(dict.fromkeys(filter(None, node.output), place))
        if node.name:
            places.nodes[node.name] = place
    return places


def _place_of(node: onnx.NodeProto) -> Place:
    """By a node's name and operator."""
    name = node.name or node.op_type
    found = _SCOPE.fullmatch(name)
    layer = int(found[1]) if found else None
    if node.domain == DOMAIN:
        return Place(layer, "attention" if node.op_type.endswith("Attention") else "selection", name, node.op_type)
    if found is None:
        return Place(layer, "decoder" if name.startswith("decoder") else "other", name)
    return Place(layer, _kind((found[2] or "").split(".")), name)


def _kind(parts: list[str]) -> str:
    """Of a module within a block, such as ["attn", "qkv"]."""
    if any("norm" in part for part in parts):
        return "norms"
    if parts[0] == "attn":
        return "projections" if len(parts) > 1 and parts[1] in _PROJECTIONS else "attention"
    return {"mlp": "mlp", "pruning": "selection", "merging": "selection"}.get(parts[0], "other")


def place_nodes(optimised: onnx.ModelProto, places: Places) -> dict[str, Place]:
    """Places of the nodes that a runtime made of a file, by the runtime's names.

    By the tensor that a node gives, which most fusions keep; in an inlined function body by its operator and its
    reader's layer; by the name before a "/", which fusion appends to; else as the first node that reads its result.
    """
    calls = {(place.layer, place.function): place for place in places.nodes.values() if place.function}
    found: dict[str, Place] = {}
    readers: dict[str, Place] = {}
    for node in reversed(optimised.graph.node):
        place = next((places.tensors[tensor] for tensor in node.output if tensor in places.tensors), None)
        reader = next((readers[tensor] for tensor in node.output if tensor in readers), None)
        if place is None and node.name.startswith(_INLINED):
            function = node.name.removeprefix(_INLINED).split("_")[0]
            place = calls.get((reader.layer if reader else None, function))
        place = place or places.nodes.get(node.name.split("/")[0]) or reader
        if place is not None:
            found[node.name] = place
            readers.update(dict.fromkeys(filter(None, node.input), place))
    return found
