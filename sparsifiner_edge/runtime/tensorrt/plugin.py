"""The project's CUDA kernels inside an engine: quickly deployable plugins of TensorRT 10.9 and later; before, see
`plugin_v3`.

Every launch in a bundle's table becomes a plugin whose ahead-of-time implementation hands its PTX to TensorRT, which
puts it into the engine. Running the engine needs neither Python nor a library of plugins.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import onnx

from sparsifiner_edge.bundle.engines import BatchRange
from sparsifiner_edge.bundle.kernels import (
    MOST_SHARED_BYTES,
    NAMESPACE,
    CompiledLaunch,
    code_file,
    kernel_model,
    read_table,
)
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt import plugin_v3
from sparsifiner_edge.runtime.tensorrt.plugin_v3 import TYPES

_registered: set[str] = set()
"""Plugins of this process: TensorRT takes each name once, and a name holds a digest of its code."""


def why_not(trt: Any, bundle: Bundle, device: CudaDevice, batch: BatchRange | None = None) -> str | None:
    """Why the kernels of a bundle cannot go into an engine for a device; None where they can."""
    table = read_table(bundle, _capability(device))
    if table is None:
        return f"the bundle has no kernels for {device.name}; export it with --board"
    if is_in_python(trt):
        return None
    most = max((launch.shared_bytes for launch in table.launches.values()), default=0)
    if most > MOST_SHARED_BYTES:
        return (
            f"a kernel takes {most >> 10} KiB of shared memory, and more than {MOST_SHARED_BYTES >> 10} are not known "
            "to work in TensorRT's plugins; float16 with head dimensions up to 64 needs less"
        )
    if batch and batch.least != batch.most:
        return (
            f"it takes one batch size, not {batch.least} to {batch.most}: TensorRT loads its kernels anew at each "
            "change, and leaks them (issue 4849); give one --batch"
        )
    return None


def is_in_python(trt: Any) -> bool:
    """Whether plugins run in Python, by `plugin_v3`: a version before 10.9 has none that are compiled ahead of time."""
    return not hasattr(trt, "QuickPluginCreationRequest")


def register(trt: Any, bundle: Bundle, device: CudaDevice) -> None:
    """Register what an engine with plugins needs where it runs.

    Raises:
        SparsifinerError: see `plugin_v3.register`.
    """
    if is_in_python(trt):
        plugin_v3.register(trt, bundle, _capability(device))


def dense_layers(bundle: Bundle, device: CudaDevice) -> tuple[str, ...]:
    """Nodes of sparse attention that the kernels' table for a device says are faster dense, where not all are."""
    table = read_table(bundle, _capability(device))
    if table is None:
        return ()
    sparse = {node for node, parts in table.nodes.items() if table.launches[parts[-1].launch].kernel == "attend"}
    return table.dense if sparse - set(table.dense) else ()


def _capability(device: CudaDevice) -> int:
    """As files are named by it: 87 of "8.7"."""
    return int(device.compute_capability.replace(".", ""))


def with_plugins(trt: Any, model: onnx.ModelProto, bundle: Bundle, device: CudaDevice) -> onnx.ModelProto:
    """Register the plugins of a bundle for a device, where `why_not` has no reason; returns its model that uses them;
    or of the model with dense attention in some layers what is left.

    Raises:
        ArtifactError: the table does not fit the model.
    """
    table = read_table(bundle, _capability(device))
    assert table is not None
    register(trt, bundle, device)
    if any(node.name in table.dense and node.op_type != "SparseAttention" for node in model.graph.node):
        here = {node.name for node in model.graph.node} - set(table.dense)
        here |= {tensor.name for tensor in model.graph.initializer}
        table = msgspec.structs.replace(
            table,
            nodes={node: parts for node, parts in table.nodes.items() if node in here},
            float32={name: origin for name, origin in table.float32.items() if origin in here},
        )
    rewritten: onnx.ModelProto = kernel_model(model, table)
    if is_in_python(trt):
        return rewritten
    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    for name, launch in table.launches.items():
        identifier = f"{NAMESPACE}::{name}"
        if identifier not in _registered:
            ptx = bundle.read(code_file(_capability(device), name)).decode("utf-8", "replace")
            trtp.register(identifier)(_describe(trt, trtp, launch))
            trtp.aot_impl(identifier)(_implement(trtp, launch, ptx))
            _registered.add(identifier)
    return rewritten


def _describe(trt: Any, trtp: Any, launch: CompiledLaunch) -> Any:
    """The function that gives shapes and types of a launch's outputs; the batch is that of its first input."""

    def description(*inputs: Any) -> Any:
        batch = inputs[0].shape_expr[0]
        outputs = launch.outputs.values()
        return tuple(trtp.from_shape_expr((batch, *x.shape), getattr(trt.DataType, TYPES[x.dtype])) for x in outputs)

    inputs = [(name, trtp.TensorDesc) for name in launch.inputs]
    return _with_signature(description, inputs, _tensors(trtp, launch.outputs))


def _implement(trtp: Any, launch: CompiledLaunch, ptx: str) -> Any:
    """The function that gives a launch's kernel, grid and block; the grid's third axis is the batch."""

    def implementation(*arguments: Any) -> Any:
        wide, high = launch.grid
        sizes = trtp.KernelLaunchParams(
            grid_x=wide,
            grid_y=high,
            grid_z=arguments[0].shape_expr[0],
            block_x=launch.threads,
            shared_mem=launch.shared_bytes,
        )
        return launch.symbol, ptx, sizes, trtp.SymIntExprs(0)

    parameters = [(name, trtp.TensorDesc) for name in launch.inputs]
    parameters += [("outputs", _tensors(trtp, launch.outputs)), ("tactic", int)]
    return _with_signature(implementation, parameters, tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs])


def _tensors(trtp: Any, names: Collection[str]) -> Any:
    """The annotation of a tuple of these tensors."""
    return types.GenericAlias(tuple, (trtp.TensorDesc,) * len(names))


def _with_signature(function: Any, parameters: Sequence[tuple[str, Any]], returns: Any) -> Any:
    """The function under the signature that TensorRT reads names and types from."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments: Sequence[inspect.Parameter] = [inspect.Parameter(n, kind, annotation=a) for n, a in parameters]
    function.__signature__ = inspect.Signature(arguments, return_annotation=returns)
    return function
