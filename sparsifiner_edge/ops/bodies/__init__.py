"""ONNX function bodies: the operators in standard operators, so that any runtime can run an exported file.

A body takes every size from `Shape`, gathers rows of a flattened [B H P, d] and holds no mask, no scatter that adds and
no cumulative sum. A file holds one body per operator, so structure that attributes decide (prefix or none, cells or
none), and whether tokens were merged, is fixed per file by `Structure`; every number stays an attribute of the node.
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
INPUT_PREFIX = "body_input_"
"""Of a body's inputs, and of no tensor outside: TensorRT 10.1 to 10.7 binds an input wrongly whose name the graph has
for another tensor.
"""
_CALL = re.compile(r"[A-Z]\w* (?:<[^<>]*> )?\([^()]*\)")
"""An operator with nothing but names and attributes in it."""
_BODIES: dict[str, Callable[[Structure], str]] = {
    "KeySelect": select.key_select,
    "LandmarkKeySelect": select.landmark_key_select,
    "SparseAttention": attention.sparse_attention,
    "DenseAttention": attention.dense_attention,
    "CachedAttention": attention.cached_attention,
    "MatchTokens": merge.match_tokens,
    "MergeTokens": merge.merge_tokens,
}


def function_body(name: str, structure: Structure | None = None) -> onnx.FunctionProto:
    """The function that a model file carries for operator `name`, in opset 20 operators.

    Raises:
        KeyError: no such operator.
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
    drop_unread(function.node, function.output)  # so that shared preludes cost nothing
    _prefix_inputs(function)
    # ONNX Runtime 1.21 names fused nodes after the first of them and refuses a file in which two have one name.
    for node in function.node:
        node.name = f"{name}/{node.output[0]}"
    return function


def _flat(text: str) -> str:
    """Bodies are written with calls within calls; of the text of a function each is a line of its own."""
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
    """Put `INPUT_PREFIX` before the inputs' names, which the text has as the schema does."""
    renamed = {name: f"{INPUT_PREFIX}{name}" for name in function.input}
    function.input[:] = renamed.values()
    for node in function.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


__all__ = ["INPUT_PREFIX", "OPSET", "Structure", "function_body"]
