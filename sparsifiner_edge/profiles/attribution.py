"""Which layer of a vision transformer, and which part of it, a node of its ONNX graph belongs to.

Weights' names do not tell: exporters transpose, rename and share them. The graph's shape does:

    norm1 -> qkv -> (selection ->) attention core -> projection -> add -> (pruning ->) norm2 -> mlp -> add

The n-th attention core makes layer n; what lies downstream of its norm1 and not of the next one's belongs to it.
Imports onnx, so that measuring alone needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import onnx

from sparsifiner_edge.ops.schema import DOMAIN

SELECTION = ("KeySelect", "LandmarkKeySelect", "TokenScore")
ATTENTION = ("SparseAttention", "DenseAttention")
FUSED_ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention")
NORMS = (
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization",
    "SkipSimplifiedLayerNormalization", "GroupNormalization", "BatchNormalization", "InstanceNormalization",
)  # fmt: skip
_PRODUCTS = ("MatMul", "Gemm")
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_INLINED = "_inlfunc_"
_BEFORE_QKV, _BEFORE_CORE, _AFTER_CORE, _AFTER_PROJECTION, _AFTER_NORM2 = range(5)
_ZONE_KINDS = ("projections", "attention", "attention", "other", "mlp")


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


class _Graph:
    """A graph with its links; tensors that no input reaches are constant."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.maker = {output: i for i, node in enumerate(self.nodes) for output in node.output if output}
        self.readers: dict[str, list[int]] = {}
        self.dynamic = {value.name for value in graph.input} - {weight.name for weight in graph.initializer}
        for i, node in enumerate(self.nodes):
            for tensor in node.input:
                self.readers.setdefault(tensor, []).append(i)
            if any(tensor in self.dynamic for tensor in node.input):
                self.dynamic.update(node.output)

    def before(self, index: int) -> list[int]:
        """Nodes that make the dynamic inputs."""
        inputs = self.nodes[index].input
        return [self.maker[tensor] for tensor in inputs if tensor in self.dynamic and tensor in self.maker]

    def after(self, index: int) -> list[int]:
        return [reader for tensor in self.nodes[index].output for reader in self.readers.get(tensor, [])]

    def is_dynamic(self, index: int) -> bool:
        return any(tensor in self.dynamic for tensor in self.nodes[index].output)

    def is_linear(self, index: int) -> bool:
        """A product of tokens and weights, not of tokens and tokens."""
        node = self.nodes[index]
        return node.op_type in _PRODUCTS and sum(tensor in self.dynamic for tensor in node.input[:2]) == 1

    def is_norm(self, index: int) -> bool:
        return self.nodes[index].op_type in NORMS

    def is_core(self, index: int) -> bool:
        node = self.nodes[index]
        if node.domain == DOMAIN:
            return node.op_type in ATTENTION
        if node.op_type in FUSED_ATTENTION:
            return True
        weighs = (self.nodes[reader].op_type == "MatMul" and not self.is_linear(reader) for reader in self.after(index))
        return node.op_type == "Softmax" and any(weighs)

    def upstream(self, index: int, stop: Any) -> Iterator[int]:
        """The nearest nodes upstream for which `stop` holds."""
        seen, queue = {index}, self.before(index)
        while queue:
            here = queue.pop()
            if here in seen:
                continue
            seen.add(here)
            if stop(here):
                yield here
            else:
                queue.extend(self.before(here))


def find_places(model: onnx.ModelProto) -> Places:
    """Places of every node of an exported file; a file without attention has no layers, and only kind "other"."""
    graph = _Graph(model.graph)
    starts = _starts(graph)
    layers = _layers(graph, starts)
    zones = _zones(graph, layers)
    selected = _selected(graph, layers, zones)
    places = Places({}, {}, {})
    for i in reversed(range(len(graph.nodes))):  # Backwards: a quantiser is its reader's.
        node = graph.nodes[i]
        layer = layers[i] if 0 <= layers[i] < len(starts) else None
        kind = _kind(graph, i, zones[i], i in selected, places) if layer is not None else "other"
        place = Place(layer, kind, node.name or node.op_type)
        if node.domain == DOMAIN:
            place = place._replace(kind=_own_kind(node.op_type))
            places.calls[layer, node.op_type] = place.name
        if node.name:
            places.nodes[node.name] = place
        places.tensors.update(dict.fromkeys(filter(None, node.output), place))
    return places


def _own_kind(op: str) -> str:
    return "selection" if op in SELECTION else "attention" if op in ATTENTION else "other"


def _starts(graph: _Graph) -> dict[int, int]:
    """First node of each layer -> its number: the norm in front of the products that feed an attention core."""
    starts: dict[int, int] = {}
    for core in filter(graph.is_core, range(len(graph.nodes))):
        products = list(graph.upstream(core, graph.is_linear))
        norms = {norm for product in products for norm in graph.upstream(product, graph.is_norm)}
        start = max(norms or products or [core])
        if start not in starts:
            starts[start] = len(starts)
    return starts


def _layers(graph: _Graph, starts: dict[int, int]) -> list[int]:
    """Per node: -1 before the first layer, the layer's number, or the number of layers in the head."""
    layers: list[int] = []
    for i in range(len(graph.nodes)):
        inherited = max((layers[maker] for maker in graph.before(i)), default=-1)
        layers.append(max(inherited, starts.get(i, -1)))
    head = _head(graph, layers, len(starts))
    if head is not None:
        layers[head] = len(starts)
        for i in range(head + 1, len(graph.nodes)):
            layers[i] = max([layers[i], *(layers[maker] for maker in graph.before(i))])
    return layers


def _head(graph: _Graph, layers: list[int], depth: int) -> int | None:
    """The norm after the last layer: each layer has as many norms as the one before it, or two."""
    if not depth:
        return None
    norms = [[i for i in range(len(layers)) if layers[i] == n and graph.is_norm(i)] for n in range(depth)]
    own = len(norms[-2]) if depth > 1 else 2
    return norms[-1][own] if own and len(norms[-1]) > own else None


def _zones(graph: _Graph, layers: list[int]) -> list[int]:
    """How far along its layer a node is; nodes of earlier layers do not count."""
    zones: list[int] = []
    for i in range(len(graph.nodes)):
        zone = max((zones[m] for m in graph.before(i) if layers[m] == layers[i]), default=_BEFORE_QKV)
        if graph.is_core(i):
            zone = max(zone, _AFTER_CORE)
        elif graph.is_linear(i):
            zone = {_BEFORE_QKV: _BEFORE_CORE, _AFTER_CORE: _AFTER_PROJECTION}.get(zone, zone)
        elif graph.is_norm(i) and zone >= _AFTER_CORE:
            zone = _AFTER_NORM2
        zones.append(zone)
    return zones


def _selected(graph: _Graph, layers: list[int], zones: list[int]) -> set[int]:
    """Downstream of TokenScore, up to the next norm: what ranks and gathers tokens."""
    found: set[int] = set()
    for i, node in enumerate(graph.nodes):
        scores = node.domain == DOMAIN and node.op_type == "TokenScore"
        follows = any(maker in found and layers[maker] == layers[i] for maker in graph.before(i))
        if scores or (follows and zones[i] < _AFTER_NORM2):
            found.add(i)
    return found


def _kind(graph: _Graph, i: int, zone: int, selected: bool, places: Places) -> str:
    node = graph.nodes[i]
    if graph.is_norm(i):
        return "norms"
    if selected:
        return "selection"
    if node.op_type in _QUANTISERS or not graph.is_dynamic(i):
        readers = [graph.nodes[reader] for reader in graph.after(i)]
        known = [places.tensors[reader.output[0]].kind for reader in readers if reader.output[0] in places.tensors]
        if known:
            return known[0]
    terms = sum(tensor in graph.dynamic for tensor in node.input)
    after_product = any(graph.is_linear(maker) for maker in graph.before(i))
    if graph.is_linear(i) or (node.op_type == "Add" and terms == 1 and after_product):  # The bias is the product's.
        return "mlp" if zone == _AFTER_NORM2 else "projections"
    if zone == _AFTER_NORM2 and node.op_type == "Add" and terms > 1:
        return "other"  # The residual.
    return _ZONE_KINDS[zone]


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
