"""Change the merges and key shares of an exported file, without another run of torch's exporter.

A search measures dozens of plans. Between the files of two plans only a few attributes and constants differ, so that a
file is ready in a fraction of a second. `float_file` checks the result against torch like any other file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.graph import add_bodies
from sparsifiner_edge.ops.graph import tidy
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.plan import LayerPlan

_DENSE_ATTRIBUTES = ("num_heads", "scale")
"""Attributes that DenseAttention shares with SparseAttention."""
_OWN_TOKENS = "own_tokens"
"""Name of the constant that locates each patch in its own token."""


def replan(
    model: onnx.ModelProto, sparsity: SparsityConfig, plan: LayerPlan, patches: int, prefix: int
) -> onnx.ModelProto:
    """Return a copy of a file with another plan; the dense plan's file has ONNX's own operators only.

    Args:
        model: File of batch 1, in float32 or int8, in which every layer merges that merges in the plan, and every layer
            selects keys that does so in the plan.
        sparsity: Settings of the model; the plan replaces its merges and shares.
        plan: The new plan.
        patches: Number of patches of the image.
        prefix: Number of tokens before the patches.

    Raises:
        GateError: The file lacks an operator that the plan needs.
    """
    model = copy.deepcopy(model)
    del model.graph.value_info[:]  # Shapes of the old plan.
    settings, counts = plan.config(sparsity), plan.tokens(patches)
    nodes = {node.name: node for node in model.graph.node}
    renamed: dict[str, str] = {}
    _set_constant(model, _OWN_TOKENS, np.arange(patches)[None])
    for layer, share in enumerate(plan.keep):
        _set_attention(model, nodes, layer, settings.of_share(share), counts[layer], prefix)
        merging = [node for node in model.graph.node if node.name.startswith(f"blocks.{layer}.merging.")]
        if plan.merge[layer]:
            if not merging:
                raise _unable(layer, "merge tokens")
            _set_merging(model, merging, layer, counts[layer], counts[layer + 1])
        elif merging:
            _remove_merging(merging, renamed)
    _free_reshapes(model)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = _latest(renamed, name)
    tidy(model)
    del model.functions[:]
    add_bodies(model)
    return _inlined(model) if plan.is_dense else model


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the file with the bodies of its custom operators in their place, for engines to fuse as they like."""
    model = inliner.inline_local_functions(model)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    tidy(model)
    return model


def _free_reshapes(model: onnx.ModelProto) -> None:
    """Let reshapes of layers infer the number of tokens."""
    shapes = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.name.startswith("blocks.") and node.input[1] in shapes:
            shape = numpy_helper.to_array(shapes[node.input[1]]).copy()
            if len(shape) > 2 and (shape[1:] > 0).all():
                shape[1] = -1
                node.input[1] = f"{node.name}.shape"
                _set_constant(model, node.input[1], shape)


def _set_attention(
    model: onnx.ModelProto,
    nodes: dict[str, onnx.NodeProto],
    layer: int,
    settings: SparsityConfig,
    patches: int,
    prefix: int,
) -> None:
    """Set the number of keys of a layer, or make its attention dense."""
    select, attention = (nodes.get(f"blocks.{layer}.attn.{name}") for name in ("KeySelect", "SparseAttention"))
    if settings.keep != 1:
        if select is None or attention is None:
            raise _unable(layer, "select keys")
        layout = settings.layout(patches, prefix)
        _set_attributes(select, keys=layout.keys, key_pool=layout.key_pool)
        _set_attributes(attention, key_pool=layout.key_pool)
    elif attention is not None:
        dense = helper.make_node(
            "DenseAttention",
            attention.input[:2],
            attention.output,
            name=f"blocks.{layer}.attn.DenseAttention",
            domain=DOMAIN,
        )
        dense.attribute.extend(entry for entry in attention.attribute if entry.name in _DENSE_ATTRIBUTES)
        model.graph.node.insert(list(model.graph.node).index(attention), dense)
        model.graph.node.remove(attention)


def _set_merging(
    model: onnx.ModelProto,
    merging: Sequence[onnx.NodeProto],
    layer: int,
    before: int,
    after: int,
) -> None:
    """Set the number of merges of a layer, with the constants that locate the original patches."""
    _set_attributes(_only(merging, "MatchTokens"), merged=before - after)
    unset, new = f"blocks.{layer}.merging.unset", f"blocks.{layer}.merging.new"
    constants = {unset: np.zeros((1, before), np.int64), new: np.arange(after, dtype=np.int64)[None]}
    for name, value in constants.items():
        _set_constant(model, name, value)
    first, second = (node for node in merging if node.op_type == "ScatterElements")
    first.input[0], first.input[2], second.input[2] = unset, new, new


def _set_constant(model: onnx.ModelProto, name: str, value: Array) -> None:
    """Add a constant, in place of the one that an earlier call added."""
    for old in [tensor for tensor in model.graph.initializer if tensor.name == name]:
        model.graph.initializer.remove(old)
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _remove_merging(merging: Sequence[onnx.NodeProto], renamed: dict[str, str]) -> None:
    """Let tokens, sizes and places pass a layer unchanged."""
    merge = _only(merging, "MergeTokens")
    renamed[merge.output[0]] = merge.input[0]
    made = {node.output[0]: node for node in merging}
    for sizes in (node for node in merging if node.op_type == "Where"):  # Absent after the last layer.
        if made[sizes.input[0]].op_type == "Equal":
            renamed[sizes.output[0]] = merge.input[1]
            continue
        for positions in merging:  # With rotary embeddings: the position of each token.
            if positions.op_type == "GatherElements" and positions.input[1] == sizes.output[0]:
                renamed[positions.output[0]] = positions.input[0]
    placed = [node for node in merging if node.op_type == "GatherElements" and node.input[0] == _placed(merging)]
    if placed:
        renamed[placed[0].output[0]] = placed[0].input[1]
    else:  # The first layer that merged: every patch is still in its own token.
        renamed[_placed(merging)] = _OWN_TOKENS


def _placed(merging: Sequence[onnx.NodeProto]) -> str:
    """Return the name of the new token of each token that enters the merge."""
    return str([node for node in merging if node.op_type == "ScatterElements"][-1].output[0])


def _latest(renamed: dict[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _only(nodes: Sequence[onnx.NodeProto], kind: str) -> onnx.NodeProto:
    return next(node for node in nodes if node.op_type == kind)


def _set_attributes(node: onnx.NodeProto, **values: int) -> None:
    for entry in node.attribute:
        if entry.name in values:
            entry.i = values[entry.name]


def _unable(layer: int, ability: str) -> GateError:
    return GateError(f"Layer {layer} of the file cannot {ability}.", "Export the plan again.")
