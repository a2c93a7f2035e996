"""From a module to an ONNX file: nodes of the domain `sparsifiner`, function bodies, metadata and structural checks."""

from __future__ import annotations

import ast
import collections
import logging
import re
import warnings
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import onnx
import torch
from torch import nn

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.onnx_file import all_nodes
from sparsifiner_edge.ops.bodies import OPSET, Structure, function_body
from sparsifiner_edge.ops.graph import has_sizes
from sparsifiner_edge.ops.schema import DOMAIN, TOPK_LIMIT, VERSION
from sparsifiner_edge.sparse.attention import PackedAttention, SparseAttention
from sparsifiner_edge.sparse.hosts import backbones

IR_VERSION = 10
"""Newest IR version that ONNX Runtime 1.21 and GStreamer 1.26's onnxinference load."""
DYNAMIC = "batch"
"""Name of the dynamic batch axis."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch's exporter names the modules of a node, outermost first, and last the node itself."""


def export_graph(module: nn.Module, size: ImageSize, batch: int | None, outputs: list[str]) -> onnx.ModelProto:
    """Export a module that takes `image` uint8 [B,H,W,3] of a size; `batch` None is dynamic.

    Raises:
        ConfigError: It reads more keys than TensorRT's TopK takes.
        GateError: The file holds something that a runtime cannot load.
    """
    _check_keys(module)
    # A dynamic batch is traced with two images: a single one would become a constant.
    example = torch.zeros(batch or 2, *height_width(size), 3, dtype=torch.uint8)
    shapes = {"image": {0: torch.export.Dim(DYNAMIC)}} if batch is None else None
    model = to_onnx(module, {"image": example}, outputs, shapes)
    tidy(model, module)
    check_structure(model)
    return model


def to_onnx(
    module: nn.Module, inputs: Mapping[str, torch.Tensor], outputs: list[str], shapes: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """Export a module with torch and add our function bodies; `shapes` gives dynamic axes of inputs."""
    with warnings.catch_warnings(), torch.no_grad():
        # Deprecations inside torch's exporter concern its own calls.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # Two inputs may have the same axis.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise GateError("torch exported nothing.", "Report this with the model's name.")
    model = program.model_proto
    model.ir_version = min(model.ir_version, IR_VERSION)
    add_bodies(model)
    return model


def _check_keys(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, SparseAttention) and layer.layout.keys > TOPK_LIMIT:
            raise ConfigError(
                f"{name} reads {layer.layout.keys} keys per tile; TensorRT's TopK takes at most {TOPK_LIMIT}.",
                "Choose a smaller --keep or image size.",
            )


def tidy(model: onnx.ModelProto, module: nn.Module) -> None:
    """Remove what only the exporter needs and unused inputs, and put the Cast of the image first.

    A dynamic batch has a Shape before that Cast.
    """
    names, read = _Names.of(module), {name for node in model.graph.node for name in node.input}
    for value in [value for value in model.graph.input if value.name not in read]:
        model.graph.input.remove(value)
    for cast in [n for n in model.graph.node if n.op_type == "Cast" and n.input[0] == "image"]:
        model.graph.node.remove(cast)
        model.graph.node.insert(0, cast)
    model.producer_name = "sparsifiner-edge"
    model.graph.name = "sparsifiner_edge"
    model.graph.doc_string = ""
    _name_nodes(model.graph, names)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    for value in [*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]


class _Names(NamedTuple):
    """Names of modules in node names: layers are "blocks.3" and their attention "blocks.3.attn" in every host library.

    Everything outside the backbone is "decoder.".

    Attributes:
        backbone: Name of the backbone in the deployed model, with a dot; "" if it is that model.
        layers: Name of its list of layers.
        packed: Attentions that compute q, k and v in one product, whose weights may come from several modules.
    """

    backbone: str
    layers: str
    packed: Set[str]

    @classmethod
    def of(cls, module: nn.Module) -> _Names:
        """Return the names for a module that holds the deployed module as `model`."""
        (path, backbone) = next(iter(backbones(module).items()), ("", None))
        if backbone is None:
            return cls("", "blocks", frozenset())
        path = path[path.find("model") :]
        names = cls(f"{path.removeprefix('model').removeprefix('.')}.".lstrip("."), backbone.layers_name, frozenset())
        packed = {names.rename(name) for name, part in module.named_modules() if isinstance(part, PackedAttention)}
        return names._replace(packed=packed)

    def rename(self, scope: str) -> str:
        """Return the new name of a module."""
        name = scope.removeprefix("model.")
        if f"{name}." == self.backbone:
            return ""
        if not name.startswith(self.backbone):
            return name if name.startswith("decoder") else f"decoder.{name}"
        inside = re.sub(rf"^{re.escape(self.layers)}\.(\d+)", r"blocks.\1", name.removeprefix(self.backbone))
        return re.sub(r"^(blocks\.\d+)\.(?:attention|self_attn)\b", r"\1.attn", inside)


def _name_nodes(graph: onnx.GraphProto, names: _Names) -> None:
    """Name each node by module and operator, such as "blocks.3.mlp.fc1.MatMul"; times per layer rely on it."""
    weights, taken = {tensor.name for tensor in graph.initializer}, collections.Counter[str]()
    paths: dict[str, str] = {}
    for node in graph.node:
        # Nodes from the exporter's own rewriting have no scope; they belong to the module of their input.
        path = _module(node, names) if node.metadata_props else paths.get(node.input[0], "")
        if path in names.packed and node.op_type in ("MatMul", "Gemm", "Add") and weights.intersection(node.input):
            path = f"{path}.qkv"
        name = f"{path}.{node.op_type}".lstrip(".")
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1
        paths.update(dict.fromkeys(node.output, path))


def _module(node: onnx.NodeProto, names: _Names) -> str:
    """Return the innermost module of a node, such as "blocks.3.mlp.fc1"; "" for the model itself."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    modules = [scope[scope.find("model.") :] for scope in ast.literal_eval(scopes)[:-1] if "model." in scope]
    return names.rename(modules[-1]) if modules else ""


def add_bodies(model: onnx.ModelProto) -> None:
    """Append the function body of every operator of our domain that the graph uses, and import the domain."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    for name in sorted({node.op_type for node in nodes}):
        uses = [node for node in nodes if node.op_type == name]
        merged = any(has_sizes(model, node) for node in uses)
        structures = {_structure(node, merged) for node in uses}
        if len(structures) > 1:
            raise GateError(f"{name} is used with {len(structures)} structures in one file.", "Use one per model.")
        model.functions.append(function_body(name, structures.pop()))
    for entry in [e for e in model.opset_import if e.domain == DOMAIN]:
        model.opset_import.remove(entry)
    if nodes:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def _structure(node: onnx.NodeProto, merged: bool) -> Structure:
    values: Mapping[str, int] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Structure(
        prefix=values.get("num_prefix", 0) > 0,
        background_tokens=values.get("key_pool", 0) > 0,
        prefix_keys=bool(values.get("prefix_keys", 1)),
        merged=merged,
    )


def check_structure(model: onnx.ModelProto) -> None:
    """Refuse what old or small runtimes cannot load.

    Raises:
        GateError: There is a foreign domain, or a scatter with a reduction.
    """
    problems = [f"domain {entry.domain!r}" for entry in model.opset_import if entry.domain not in ("", DOMAIN)]
    problems += [f"a {node.op_type} node ({node.name})" for node in all_nodes(model) if _adds_up(node)]
    if problems:
        raise GateError(f"The exported file holds {'; '.join(problems)}.", "Report this with the model's name.")


def _adds_up(node: onnx.NodeProto) -> bool:
    """Return True if a node scatters with a reduction, or in a way that not every engine supports."""
    replaces = not any(entry.name == "reduction" and entry.s not in (b"", b"none") for entry in node.attribute)
    return "Scatter" in node.op_type and not (node.op_type == "ScatterElements" and replaces)
