"""Analysis of the nodes that update token sizes and positions after each merge in an exported graph.

The exported graph updates sizes and positions with standard operators. The Triton kernels do it in the same launch as
the merge (`ops.triton.schedule_merge.schedule_merging`), so the names of these tensors must be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsifiner_edge.ops.schema import DOMAIN


class Carried(NamedTuple):
    """Nodes and tensor names that belong to one merge layer.

    Attributes:
        match: MatchTokens node.
        merge: MergeTokens node.
        sizes: Name of the sizes of the new tokens, or None if nothing reads them.
        places: Name of the new token index of each original patch, or None if nothing reads it.
        before: Name of the token index of each original patch before this merge, or None if it is the identity.
        positions: Names of the pixel positions of the new tokens and of the old tokens, or None if nothing reads them.
    """

    match: Any
    merge: Any
    sizes: str | None
    places: str | None
    before: str | None
    positions: tuple[str, str] | None


def carried_along(model: Any) -> list[Carried]:
    """Find the tensors that each merge layer updates.

    Returns:
        One entry per merge layer, in graph order. Empty if a layer differs from the graph that `sparse.merge` exports.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    constant = _constants(model)
    layers = [
        _behind(node, model, producers, constant) for node in model.graph.node if _is(node, "MergeTokens", DOMAIN)
    ]
    return [] if None in layers else [layer for layer in layers if layer is not None]


def _is(node: Any, kind: str, domain: str = "") -> bool:
    """Return True if `node` exists and has this operator type and domain."""
    return node is not None and (node.op_type, node.domain) == (kind, domain)


def _constants(model: Any) -> set[str]:
    """Return the names of the tensors that do not depend on pixels: weights, shapes and what is computed from them."""
    names = {tensor.name for tensor in model.graph.initializer}
    return _closure(model, names, ("Constant", "Shape", "Size"))


def _closure(model: Any, names: set[str], kinds: tuple[str, ...] = ()) -> set[str]:
    """Return `names` and the outputs of all nodes that read nothing else or whose operator type is in `kinds`."""
    names = set(names)
    for node in model.graph.node:
        if (names.issuperset(node.input) or node.op_type in kinds) and node.domain != DOMAIN:
            names.update(node.output)
    return names


def _behind(merge: Any, model: Any, producers: Mapping[str, Any], constant: set[str]) -> Carried | None:
    """Analyze the nodes after one MergeTokens; return None if they do not have the expected form."""
    _, sizes, pairs = merge.input
    match = producers.get(pairs)
    if match is None or not _is(match, "MatchTokens", DOMAIN) or match.input[1] != sizes:
        return None
    rows = _closure(model, {pairs, *constant}) - constant
    nodes = [node for node in model.graph.node if rows.intersection(node.input)]

    def gathers_sizes(node: Any) -> bool:
        return _is(node, "GatherElements") and node.input[0] == sizes

    sums = [n for n in nodes if _is(n, "Where") and gathers_sizes(producers.get(n.input[1]))]
    after = [n for n in nodes if _is(n, "ScatterElements") and _is(producers.get(n.input[0]), "ScatterElements")]
    moved = [n for n in model.graph.node if _is(n, "GatherElements") and after and n.input[0] == after[0].output[0]]
    if max(len(sums), len(after), len(moved)) > 1:
        return None
    before, places = moved[0].input[1] if moved else None, (moved or after or None)

    def is_larger(node: Any) -> bool:
        return _is(node, "Where") and not rows.isdisjoint(node.input)

    larger = [n for n in model.graph.node if _is(n, "GatherElements") and is_larger(producers.get(n.input[1]))]
    positions = (larger[0].output[0], larger[0].input[0]) if len(larger) == 1 else None
    sizes = sums[0].output[0] if sums else None
    return Carried(match, merge, sizes, places and places[0].output[0], before, positions)
