"""Compiled CUDA kernels in a bundle: the table of kernels, and a model whose nodes launch them.

kernels/sm87.json                 table: schema version, launches, and the model nodes that they replace
kernels/sm87/attend_1a2b3c.ptx    code of one launch in PTX assembly, as TensorRT's plugin takes it
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

KERNELS_SCHEMA = 4
FOLDER = "kernels"
NAMESPACE = "sparsifiner_kernels"
"""ONNX domain of launch nodes; TensorRT reads it as the plugin namespace."""
MOST_SHARED_BYTES = 48 << 10
"""Maximum shared memory per block in bytes: the limit above which a kernel must request more from the driver.

TensorRT is not known to make that request.
"""
DType = Literal["float32", "float16", "bfloat16", "int32"]
"""Element types of tensors that launches take."""
_Size = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
_Bytes = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
_Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
"""Name of a parameter or launch; a launch's name also names its file and plugin."""


class LaunchTensor(Struct, frozen=True):
    """Tensor that a launch reads or writes.

    Attributes:
        dtype: Element type.
        shape: Shape without the batch axis.
    """

    dtype: DType
    shape: tuple[_Size, ...]


class CompiledLaunch(Struct, frozen=True, kw_only=True):
    """One launch of compiled code, for any batch size.

    Attributes:
        kernel: Name of the kernel in the plan.
        symbol: Name of the function in the code.
        grid: Number of blocks in x and y; z is the batch.
        threads: Number of threads per block.
        shared_bytes: Dynamic shared memory per block in bytes.
        inputs: Input tensors by parameter name, in the order of the kernel's parameters.
        outputs: Output tensors by parameter name; their parameters follow those of the inputs.
    """

    kernel: str | None = None
    symbol: str
    grid: tuple[_Size, _Size]
    threads: _Size
    shared_bytes: _Bytes = field(name="shared")
    inputs: dict[_Name, LaunchTensor]
    outputs: dict[_Name, LaunchTensor]


class NodeLaunch(Struct, frozen=True):
    """Launch that replaces a node or part of a node.

    Attributes:
        name: Name of the new node.
        launch: Key of the launch in `KernelTable.launches`.
        inputs: Names of the model's tensors that the launch reads.
        outputs: Names of the model's tensors that the launch writes.
    """

    name: str
    launch: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class KernelTable(Struct, frozen=True, kw_only=True):
    """Content of `kernels/smNN.json`.

    Attributes:
        schema_version: Version of the format.
        launches: Launches by name.
        nodes: Launches that replace a node, in order, by the node's name.
        float32: Name of a weight that launches read as float32 -> name of the model's weight of another type.
        int64: Name of an int64 tensor of the model -> name of the int32 tensor that launches read and write instead.
        dense: Names of the sparse attention nodes whose layers are estimated to be faster with dense attention.
        triton: Version of Triton that compiled the code.
        ptx_version: PTX version of the code, which determines the driver that it needs.
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
    """Return the path of the table for a compute capability (times ten) inside a bundle."""
    return f"{FOLDER}/sm{capability}.json"


def code_file(capability: int, launch: str) -> str:
    """Return the path of a launch's PTX code inside a bundle."""
    return f"{FOLDER}/sm{capability}/{launch}.ptx"


def read_table(bundle: Bundle, capability: int) -> KernelTable | None:
    """Read the kernel table of a bundle; None if its manifest lists no kernels for that GPU.

    Args:
        bundle: A checked bundle.
        capability: Compute capability times ten, such as 87.

    Raises:
        ArtifactError: The table is malformed or has another schema version.
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
        if not name.isprintable():  # A lone surrogate, for example: valid in JSON, but not in a model.
            raise ArtifactError(f"{path} has the name {name!r:.60}, which is not printable.", AGAIN)
    return table


def kernel_model(model: Any, table: KernelTable) -> Any:
    """Return a copy of the model in which launches replace the nodes of a kernel table.

    A launch is a node of domain `NAMESPACE`, without a function body, whose type is the launch's name. Its attributes
    `plugin_namespace` and `plugin_version` are for parsers older than TensorRT 10.10, which do not read the domain. The
    copy also drops nodes whose outputs the launches write, and function bodies that no node uses any more.

    Raises:
        ArtifactError: The model lacks a node or a weight of the table.
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
