"""Compiled CUDA kernels in a bundle: their table, and the model whose nodes are launches of them.

    kernels/sm87.json                 the table: schema version, launches, and which nodes of the model they replace
    kernels/sm87/attend_1a2b3c.ptx    one launch: assembly, as TensorRT's plugin takes it
    kernels/sm87/attend_1a2b3c.cubin  the same as machine code, for programs that launch with the driver API

A launch has `symbol`, `grid` (x, y; z is the batch), `threads`, `shared`, `inputs` and `outputs` (names in the order of
the kernel's parameters in `ptx`), and `tensors`: per name `dtype` and `shape` without the batch axis.
`nodes` lists for each replaced node its launches, each with the model's names of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import MAX_JSON, field, parse_json
from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import read_listed
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.ops.graph import drop_unused
from sparsifiner_edge.ops.schema import DOMAIN

SCHEMA = 1
FOLDER = "kernels"
NAMESPACE = "sparsifiner_kernels"
"""Domain of nodes that are launches; TensorRT reads it as the namespace of plugins."""
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
"""Types of tensors that launches take, and TensorRT's names of them."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def table_file(capability: int) -> str:
    """Where the table for a compute capability (times ten) is in a bundle."""
    return f"{FOLDER}/sm{capability}.json"


def code_file(capability: int, launch: str, kind: str) -> str:
    """Where the code of a launch is in a bundle; kind: "ptx" or "cubin"."""
    return f"{FOLDER}/sm{capability}/{launch}.{kind}"


def read_table(folder: Path, manifest: Manifest, capability: int) -> dict[str, Any] | None:
    """The table of a checked bundle; None where its manifest lists no kernels for that GPU.

    Raises:
        ArtifactError: of a newer schema, or malformed.
    """
    name = table_file(capability)
    path = folder / name
    if name not in manifest.files:
        return None
    table = parse_json(read_listed(folder, manifest, name, MAX_JSON), path, SCHEMA)
    for name, launch in field(table, path, "launches", dict).items():
        if not _NAME.fullmatch(name):
            raise ArtifactError(f"{path} names a launch {name!r}.", "Export the bundle again.")
        for key, kind in (("symbol", str), ("grid", list), ("threads", int), ("shared", int), ("tensors", dict)):
            field(launch, path, key, kind)
        _check_launch(launch, path)
    for entries in field(table, path, "nodes", dict).values():
        for entry in entries if isinstance(entries, list) else [entries]:
            _check_entry(entry, table, path)
    copies = field({"float32": {}} | table, path, "float32", dict)
    if not all(isinstance(origin, str) for origin in copies.values()):
        raise ArtifactError(f"{path}: float32 holds what is no name.", "Export the bundle again.")
    return table


def _check_launch(launch: dict[str, Any], path: Path) -> None:
    tensors, numbers = launch["tensors"], list(launch["grid"])
    for name in (*field(launch, path, "inputs", list), *field(launch, path, "outputs", list)):
        entry = field(tensors, path, name, dict) if isinstance(name, str) else {}
        numbers += field(entry, path, "shape", list)
        if field(entry, path, "dtype", str) not in TYPES:
            raise ArtifactError(f"{path} has the type {entry['dtype']!r:.60}.", "Export the bundle again.")
    if len(launch["grid"]) != 2 or not all(type(number) is int and 0 < number <= MOST_COUNT for number in numbers):
        raise ArtifactError(f"{path} has a grid or a shape that cannot be.", "Export the bundle again.")


def _check_entry(entry: Any, table: dict[str, Any], path: Path) -> None:
    entry = entry if isinstance(entry, dict) else {}
    if field(entry, path, "launch", str) not in table["launches"]:
        raise ArtifactError(f"{path} has no launch {entry['launch']!r}.", "Export the bundle again.")
    field(entry, path, "name", str)
    names = [*field(entry, path, "inputs", list), *field(entry, path, "outputs", list)]
    if not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{path} names a tensor {names!r:.60}.", "Export the bundle again.")


def kernel_model(model: Any, table: Mapping[str, Any]) -> Any:
    """The model with launches where it has nodes of the table; its own operators' bodies go where none is left.

    A launch is a node of domain `NAMESPACE` whose type is the launch's name, without a body. `plugin_namespace` and
    `plugin_version` are for parsers older than TensorRT 10.10, which do not read the domain.

    Raises:
        ArtifactError: the model lacks a node of the table.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    replaced: list[Any] = []
    missing = set(table["nodes"]) - {node.name for node in made.graph.node if node.domain == DOMAIN}
    if missing:
        raise ArtifactError(f"The kernels are for another model: it has no node {min(missing)!r}.", "Export it again.")
    for node in made.graph.node:
        launches = table["nodes"].get(node.name) if node.domain == DOMAIN else None
        replaced += [node] if launches is None else [_node(entry) for entry in launches]
    _add_float_copies(made, table)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in replaced]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    drop_unused(made)
    made.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, 1))
    return made


def _node(entry: Mapping[str, Any]) -> Any:
    import onnx

    return onnx.helper.make_node(
        entry["launch"], entry["inputs"], entry["outputs"], entry["name"],
        domain=NAMESPACE, plugin_namespace=NAMESPACE, plugin_version="1",
    )  # fmt: skip


def _add_float_copies(model: Any, table: Mapping[str, Any]) -> None:
    """Weights that launches want in float32 and the model has in another type, under names of the table."""
    import numpy as np
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, origin in table.get("float32", {}).items():
        if origin not in weights:
            raise ArtifactError(f"The kernels are for another model: it has no {origin!r}.", "Export it again.")
        tensor = weights[origin]
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))


def plain_ptx(ptx: str) -> str:
    """PTX without what is for debuggers: it names files of the machine that compiled it."""
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?\}\s*$", "", ptx, flags=re.MULTILINE | re.DOTALL)
    kept = [line for line in ptx.splitlines() if not re.match(r"\s*\.(loc|file)\s", line)]
    return "\n".join(kept).rstrip() + "\n"


def ordered_ptx(ptx: str, symbol: str, order: Sequence[int]) -> str:
    """PTX whose kernel takes its parameters in another order, and not at all those that `order` leaves out.

    The body names parameters, so only their declarations move. TensorRT passes inputs, then outputs, and nothing else;
    a compiler's own parameters at the end, which no instruction reads, must go.

    Args:
        order: numbers of the parameters that stay, from 0.

    Raises:
        ArtifactError: there is no such kernel, or one that goes is read.
    """
    head = re.compile(rf"(\.entry\s+{re.escape(symbol)}\s*\()([^)]*)(\))")
    match = head.search(ptx)
    declared = [line.strip() for line in match[2].split(",")] if match else []
    if match is None or max(order, default=-1) >= len(declared):
        raise ArtifactError(f"The PTX has no kernel {symbol!r} of that many parameters.", "Export the bundle again.")
    names = [line.split()[-1] for line in declared]
    rest = ptx[match.end() :]
    for number in set(range(len(names))) - set(order):
        if re.search(rf"{re.escape(names[number])}\b", rest):
            raise ArtifactError(f"The kernel {symbol!r} reads its parameter {number}.", "Export the bundle again.")
    parameters = ",\n\t".join(declared[number] for number in order)
    return f"{ptx[: match.start()]}{match[1]}\n\t{parameters}\n{match[3]}{rest}"
