"""ONNX function bodies: decompositions into standard operators, so that every runtime can run an exported model.

A body reads all sizes from `Shape` and gathers rows of a flattened [B H P, d] tensor. It contains no mask, no adding
scatter and no cumulative sum. A model has one body per operator. Its structure is therefore fixed per model by
`Structure`: with or without prefix tokens, background tokens and merged tokens. All numbers stay attributes of the
nodes.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import onnx
import onnx.parser

from sparsifiner_edge.ops.bodies import attention, merge, select
from sparsifiner_edge.ops.bodies.common import CONSTANTS, Structure
from sparsifiner_edge.ops.graph import drop_unread
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS, VERSION

OPSET = 20
"""Version of the standard operator set in the bodies."""
INPUT_PREFIX = "body_input_"
"""Prefix of the input names of a body, which no tensor outside has.

TensorRT 10.1 to 10.7 binds an input incorrectly if the graph has another tensor of the same name.
"""
_CALL = re.compile(r"[A-Z]\w* (?:<[^<>]*> )?\([^()]*\)")
"""Pattern of an operator call without nested calls."""
_BODIES: dict[str, Callable[[Structure], str]] = {
    "KeySelect": select.key_select,
    "LandmarkKeySelect": select.landmark_key_select,
    "SparseAttention": attention.sparse_attention,
    "DenseAttention": attention.dense_attention,
    "CachedAttention": attention.cached_attention,
    "MatchTokens": merge.match_tokens,
    "MergeTokens": merge.merge_tokens,
}
"""Functions that return the lines of a body, by operator name."""


def function_body(name: str, structure: Structure | None = None) -> onnx.FunctionProto:
    """Return the ONNX function of an operator, as a decomposition into operators of opset 20.

    Args:
        name: Name of the operator.
        structure: Structure of the model; None stands for the most general one.

    Raises:
        KeyError: There is no such operator.
    """
    op, structure = OPERATORS[name], structure or Structure()
    lines = _flat(CONSTANTS + _BODIES[name](structure))
    attributes = f"<{', '.join(a.name for a in op.attributes)}> " if op.attributes else ""
    inputs = ", ".join(t.name for t in op.inputs)
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
        f"{name} {attributes}({inputs}) => ({op.output.name}) {{\n{lines}}}"
    )
    function = onnx.parser.parse_function(text)
    function.doc_string = f"{DOMAIN}::{name} version {VERSION}. {op.doc}"
    drop_unread(function.node, function.output)  # removes unused lines of the shared parts
    _prefix_inputs(function)
    # ONNX Runtime 1.21 names a fused node after its first node and rejects models with duplicate names, so every node
    # gets a unique one.
    for node in function.node:
        node.name = f"{name}/{node.output[0]}"
    return function


def _flat(text: str) -> str:
    """Flatten nested calls: ONNX function text allows one call per line, but bodies are written with nested calls."""
    lines: list[str] = []
    for line in filter(str.strip, text.splitlines()):
        target, _, call = line.partition(" = ")
        while (inner := _CALL.search(call)) and inner.group() != call:
            name = f"n{len(lines)}"
            lines.append(f"{name} = {inner.group()}")
            call = call[: inner.start()] + name + call[inner.end() :]
        lines.append(f"{target.strip()} = {call}")
    return "\n".join(lines)


def _prefix_inputs(function: onnx.FunctionProto) -> None:
    """Add `INPUT_PREFIX` to the names of the inputs, which are those of the schema in the text."""
    renamed = {name: f"{INPUT_PREFIX}{name}" for name in function.input}
    function.input[:] = renamed.values()
    for node in function.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


__all__ = ["INPUT_PREFIX", "OPSET", "Structure", "function_body"]
