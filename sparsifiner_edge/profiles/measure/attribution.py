"""Which layer of a vision transformer, and which part of it, a node of its ONNX graph belongs to.

The exported file's nodes are named by their module, such as "blocks.3.mlp.fc1.MatMul" (`export.graph`): layer 3, mlp.
What a quantiser or a change of types put between them belongs to what reads it. Files of bundle schema 1 have other
names, and no layers here.
Imports onnx, so that measuring alone needs none of this.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import onnx

from sparsifiner_edge.ops.schema import DOMAIN

SELECTION = ("KeySelect", "LandmarkKeySelect", "TokenScore")
ATTENTION = ("SparseAttention", "DenseAttention")
_PROJECTIONS = ("qkv", "proj", "q_proj", "k_proj", "v_proj", "gate")
_BETWEEN = ("QuantizeLinear", "DequantizeLinear", "Cast")
_INLINED = "_inlfunc_"
_SCOPE = re.compile(r"(?:model\.)?blocks\.(\d+)\.(?:(.*)\.)?[^.]*")


class Place(NamedTuple):
    """Where a node belongs.

    Attributes:
        layer: from 0; None outside the layers.
        kind: one of `kinds.KINDS`.
        name: of the node in the exported file.
    """

    layer: int | None
    kind: str
    name: str


class Places(NamedTuple):
    """Places of a file's nodes: by node name, by output tensor, and calls of our operators by layer and operator."""

    nodes: dict[str, Place]
    tensors: dict[str, Place]
    calls: dict[tuple[int | None, str], str]


def find_places(model: onnx.ModelProto) -> Places:
    """Places of every node of an exported file."""
    places = Places({}, {}, {})
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    for node in reversed(model.graph.node):  # Backwards: what is between two is its reader's.
        place = _place_of(node)
        if node.op_type in _BETWEEN and place.layer is None:
            following = [places.nodes.get(reader.name) for t in node.output for reader in readers.get(t, [])]
            place = next((found._replace(name=place.name) for found in following if found), place)
        if node.domain == DOMAIN:
            places.calls[place.layer, node.op_type] = place.name
        if node.name:
            places.nodes[node.name] = place
        places.tensors.update(dict.fromkeys(filter(None, node.output), place))
    return places


def _place_of(node: onnx.NodeProto) -> Place:
    """By a node's name and operator."""
    name = node.name or node.op_type
    found = _SCOPE.fullmatch(name)
    layer = int(found[1]) if found else None
    if node.domain == DOMAIN:
        return Place(layer, _own_kind(node.op_type), name)
    return Place(layer, _kind((found[2] or "").split(".")) if found else "other", name)


def _own_kind(op: str) -> str:
    return "selection" if op in SELECTION else "attention" if op in ATTENTION else "other"


def _kind(parts: list[str]) -> str:
    """Of a module within a block, such as ["attn", "qkv"]."""
    if any(part.startswith("norm") or part.endswith("_norm") for part in parts):
        return "norms"
    if parts[0] == "attn":
        return "projections" if len(parts) > 1 and parts[1] in _PROJECTIONS else "attention"
    return {"mlp": "mlp", "pruning": "selection"}.get(parts[0], "other")


def place_nodes(optimised: onnx.ModelProto, places: Places) -> dict[str, Place]:
    """Places of the nodes that a runtime made of a file, by the runtime's names.

    By the tensor that a node gives, which fusion keeps; by the name before a "/", which fusion appends to; for nodes
    of an inlined function body by the operator it is; else as the node that reads its result, or makes its input.
    """
    nodes = list(optimised.graph.node)
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for tensor in node.input:
            readers.setdefault(tensor, []).append(i)
    found: dict[int, Place] = {}
    for i in reversed(range(len(nodes))):
        after = [found[reader] for t in nodes[i].output for reader in readers.get(t, []) if reader in found]
        place = _place_one(nodes[i], after, places)
        if place is not None:
            found[i] = place
    makers = {tensor: i for i, node in enumerate(nodes) for tensor in node.output}
    for i, node in enumerate(nodes):
        if i not in found:
            before = [found[makers[tensor]] for tensor in node.input if makers.get(tensor) in found]
            found[i] = before[0] if before else Place(None, "other", node.name)
    return {nodes[i].name: place for i, place in found.items()}


def _place_one(node: onnx.NodeProto, after: list[Place], places: Places) -> Place | None:
    for tensor in node.output:
        if tensor in places.tensors:
            return places.tensors[tensor]
    if node.name.startswith(_INLINED):
        return inlined_place(node.name, [place.layer for place in after], places)
    by_name = places.nodes.get(node.name.split("/")[0])
    return by_name or (after[0] if after else None)


def inlined_place(name: str, layers: list[int | None], places: Places) -> Place:
    """Place of a node "_inlfunc_KeySelect_token_3_KeySelect/top"; its readers' layers tell which call it is of."""
    op = name.removeprefix(_INLINED).split("_")[0].split("/")[0]
    known = [layer for layer in layers if layer is not None]
    layer = min(known) if known else None
    return Place(layer, _own_kind(op), places.calls.get((layer, op), op))


def operator_of(name: str, op: str) -> str:
    """What a runtime's node is called in a table: the function whose body it is from, else its own operator."""
    return name.removeprefix(_INLINED).split("_")[0] if name.startswith(_INLINED) else op
