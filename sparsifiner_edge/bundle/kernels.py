"""Compiled CUDA kernels in a bundle: their table, and the model whose nodes are launches of them.

kernels/sm87.json                 the table: schema version, launches, and which nodes of the model they replace
kernels/sm87/attend_1a2b3c.ptx    one launch: assembly, as TensorRT's plugin takes it
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from sparsifiner_edge.artifacts import MAX_JSON, parse_json
from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.bundle.manifest import AGAIN
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.ops.graph import tidy
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.records import read_record

KERNELS_SCHEMA = 3
FOLDER = "kernels"
NAMESPACE = "sparsifiner_kernels"
"""Domain of nodes that are launches; TensorRT reads it as the namespace of plugins."""
MOST_SHARED_BYTES = 48 << 10
"""Of a block: what a kernel may have without asking the driver for more, which TensorRT is not known to do."""
DType = Literal["float32", "float16", "bfloat16", "int32"]
"""Types of tensors that launches take."""
_Size = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
_Bytes = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
_Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
"""Of a parameter, or of a launch, which becomes the name of a file and of a plugin."""


class LaunchTensor(Struct, frozen=True):
    """A tensor that a launch reads or writes; `shape` is without the batch axis."""

    dtype: DType
    shape: tuple[_Size, ...]


class CompiledLaunch(Struct, frozen=True, kw_only=True):
    """One launch of compiled code, for any batch.

    Attributes:
        kernel: its name in the plan. symbol: of the function in the code.
        grid: blocks in x and y; z is the batch. threads: of a block. shared_bytes: dynamic shared memory of a block.
        inputs, outputs: by the names of the kernel's parameters, in their order: inputs, then outputs.
    """

    kernel: str | None = None
    symbol: str
    grid: tuple[_Size, _Size]
    threads: _Size
    shared_bytes: _Bytes = field(name="shared")
    inputs: dict[_Name, LaunchTensor]
    outputs: dict[_Name, LaunchTensor]


class NodeLaunch(Struct, frozen=True):
    """A launch in the place of a node, or of a part of it: `inputs` and `outputs` are the model's names."""

    name: str
    launch: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class KernelTable(Struct, frozen=True, kw_only=True):
    """What `kernels/smNN.json` says.

    Attributes:
        launches: by name. nodes: name of a node that they replace -> its launches, in order.
        float32: name of a weight that launches read as float32 -> the model's own, of another type.
        int64: name of a tensor of the model -> what launches write and read in its place, int32.
        dense: nodes of sparse attention whose layers are taken to be faster with dense attention.
        triton, ptx_version: what made the code, and for which driver.
    """

    schema_version: int = KERNELS_SCHEMA
    launches: dict[_Name, CompiledLaunch]
    nodes: dict[str, Annotated[tuple[NodeLaunch, ...], Meta(min_length=1)]]
    float32: dict[str, str] = {}
    int64: dict[str, str] = {}
    dense: tuple[str, ...] = ()
    triton: str | None = None
    ptx_version: float | None = None


def table_file(capability: int) -> str:
    """Where the table for a compute capability (times ten) is in a bundle."""
    return f"{FOLDER}/sm{capability}.json"


def code_file(capability: int, launch: str) -> str:
    """Where the PTX of a launch is in a bundle."""
    return f"{FOLDER}/sm{capability}/{launch}.ptx"


def read_table(bundle: Bundle, capability: int) -> KernelTable | None:
    """The table of a bundle; None where its manifest lists no kernels for that GPU.

    Raises:
        ArtifactError: of another version, or malformed.
    """
    file = table_file(capability)
    path = bundle.folder / file
    if file not in bundle.manifest.files:
        return None
    table = read_record(parse_json(bundle.read(file, MAX_JSON), path, KERNELS_SCHEMA, AGAIN), KernelTable, path, AGAIN)
    names = [*table.float32, *table.float32.values(), *table.int64, *table.int64.values(), *table.dense]
    for node in (node for nodes in table.nodes.values() for node in nodes):
        if node.launch not in table.launches:
            raise ArtifactError(f"{path} has no launch {node.launch!r:.60}.", AGAIN)
        names += [node.name, *node.inputs, *node.outputs]
    for name in names:
        if not name.isprintable():  # Half a character, for one, which JSON can hold and a model cannot.
            raise ArtifactError(f"{path} has the name {name!r:.60}.", AGAIN)
    return table


def kernel_model(model: Any, table: KernelTable) -> Any:
    """The model with launches where it has nodes of the table; its own operators' bodies go where none is left, and so
    do nodes whose results launches write too.

    A launch is a node of domain `NAMESPACE` whose type is the launch's name, without a body. `plugin_namespace` and
    `plugin_version` are for parsers older than TensorRT 10.10, which do not read the domain.

    Raises:
        ArtifactError: the model lacks a node or a weight of the table.
    """
    import numpy as np
    import onnx

    converted, nodes = copy.deepcopy(model), list[Any]()
    weights = {tensor.name: tensor for tensor in converted.graph.initializer}
    missing = set(table.nodes) - {node.name for node in converted.graph.node if node.domain == DOMAIN}
    missing |= set(table.float32.values()) - weights.keys()
    if missing:
        raise ArtifactError(f"The kernels are for another model: it has no {min(missing)!r}.", "Export it again.")
    written = {name for launches in table.nodes.values() for launch in launches for name in launch.outputs}
    written |= table.int64.keys()
    for node in converted.graph.node:
        launches = table.nodes.get(node.name) if node.domain == DOMAIN else None
        if launches is None:
            if written.isdisjoint(node.output):
                nodes.append(copy.deepcopy(node))
            continue
        for launch in launches:
            names = {"domain": NAMESPACE, "plugin_namespace": NAMESPACE, "plugin_version": "1"}
            nodes.append(onnx.helper.make_node(launch.launch, launch.inputs, launch.outputs, launch.name, **names))
            for name, origin in table.int64.items():
                if origin in launch.outputs:
                    nodes.append(onnx.helper.make_node("Cast", [origin], [name], to=onnx.TensorProto.INT64))
    for name, origin in table.float32.items():
        values = onnx.numpy_helper.to_array(weights[origin]).astype(np.float32)
        converted.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)
    tidy(converted)
    converted.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, 1))
    return converted
