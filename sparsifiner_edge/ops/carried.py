"""What an exported graph does, in standard operators, with sizes and places of tokens that merge: a launch of ours does
it beside the merging itself (`ops.triton.schedule_merge.schedule_merging`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsifiner_edge.ops.schema import DOMAIN


class Carried(NamedTuple):
    """Names in the graph behind one MergeTokens.

    Attributes:
        match, merge: the two nodes.
        sizes, places: what goes on: of the new tokens, and of the original patches. before: places so far; None: as
            they lie. positions: where the new tokens' pixels were, and before that. Each None where nothing reads it.
    """

    match: Any
    merge: Any
    sizes: str | None
    places: str | None
    before: str | None
    positions: tuple[str, str] | None


def carried_along(model: Any) -> list[Carried]:
    """By merging layer, in order; none where a layer's graph is not as the exporter of `sparse.merge` writes it."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constant = _constants(model)
    layers = [
        _behind(node, model, producers, constant) for node in model.graph.node if _is(node, "MergeTokens", DOMAIN)
    ]
    return [] if None in layers else [one for one in layers if one is not None]


def _is(node: Any, kind: str, domain: str = "") -> bool:
    return node is not None and (node.op_type, node.domain) == (kind, domain)


def _constants(model: Any) -> set[str]:
    """Names that no pixel changes: weights, shapes, and what is made of them."""
    names = {tensor.name for tensor in model.graph.initializer}
    return _closure(model, names, ("Constant", "Shape", "Size"))


def _closure(model: Any, names: set[str], kinds: tuple[str, ...] = ()) -> set[str]:
    """These names, and all that is made of nothing else; or by nodes of these kinds."""
    names = set(names)
    for node in model.graph.node:
        if (names.issuperset(node.input) or node.op_type in kinds) and node.domain != DOMAIN:
            names.update(node.output)
    return names


def _behind(merge: Any, model: Any, producers: Mapping[str, Any], constant: set[str]) -> Carried | None:
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
