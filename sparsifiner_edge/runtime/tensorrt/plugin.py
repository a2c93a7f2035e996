"""This project's CUDA kernels as quickly deployable plugins of TensorRT 10.9 and later.

Every launch in the bundle's kernel table becomes a plugin. Its ahead-of-time implementation passes the PTX code to
TensorRT, which stores it in the engine. Running the engine needs neither Python nor a plugin library.

For earlier versions of TensorRT see `plugin_v3`.
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
"""Plugins registered in this process. TensorRT accepts each name once; the name contains a digest of the code."""


def why_not(trt: Any, bundle: Bundle, device: CudaDevice, batch: BatchRange | None = None) -> str | None:
    """Return why a bundle's kernels cannot be used in an engine, or None if they can.

    Args:
        trt: Module `tensorrt`.
        bundle: Bundle with the kernels.
        device: GPU of the engine.
        batch: Batch sizes of the engine, if known.
    """
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
            f"an engine with these kernels takes one batch size, not {batch.least} to {batch.most}, because "
            "TensorRT leaks kernels whenever the size changes "
            "(https://github.com/NVIDIA/TensorRT/issues/4849); give --batch SIZE"
        )
    return None


def is_in_python(trt: Any) -> bool:
    """Return True if plugins run in Python (`plugin_v3`): before 10.9, TensorRT has no ahead-of-time plugins."""
    return not hasattr(trt, "QuickPluginCreationRequest")


def register(trt: Any, bundle: Bundle, device: CudaDevice) -> None:
    """Register the plugins that an engine needs at run time. Nothing is needed if the engine contains its code.

    Raises:
        BackendError: TensorRT rejects a plugin, or the driver library cannot be loaded.
        ArtifactError: The bundle's kernel table or code is malformed.
    """
    if is_in_python(trt):
        plugin_v3.register(trt, bundle, _capability(device))


def dense_layers(bundle: Bundle, device: CudaDevice) -> tuple[str, ...]:
    """Return the sparse attention nodes that run faster with dense attention on a device.

    The bundle's kernel table lists them. The result is empty if these are all sparse attention nodes, which is the
    variant `dense`.
    """
    table = read_table(bundle, _capability(device))
    if table is None:
        return ()
    sparse = {node for node, parts in table.nodes.items() if table.launches[parts[-1].launch].kernel == "attend"}
    return table.dense if sparse - set(table.dense) else ()


def _capability(device: CudaDevice) -> int:
    """Return the compute capability as it appears in file names, such as 87 for "8.7"."""
    return int(device.compute_capability.replace(".", ""))


def with_plugins(trt: Any, model: onnx.ModelProto, bundle: Bundle, device: CudaDevice) -> onnx.ModelProto:
    """Register a bundle's plugins for a device and rewrite a model to use them.

    Call this only if `why_not` returns None.

    Args:
        trt: Module `tensorrt`.
        model: Model of the bundle, possibly with dense attention in some layers.
        bundle: Bundle with the kernels.
        device: GPU of the engine.

    Returns:
        The model with launches of kernels in place of the nodes that they replace.

    Raises:
        ArtifactError: The kernel table does not fit the model.
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
    """Return the function that tells TensorRT the shapes and types of a launch's outputs."""

    def description(*inputs: Any) -> Any:
        """Return the descriptors of the outputs; the batch size is that of the first input."""
        batch = inputs[0].shape_expr[0]
        outputs = launch.outputs.values()
        return tuple(trtp.from_shape_expr((batch, *x.shape), getattr(trt.DataType, TYPES[x.dtype])) for x in outputs)

    inputs = [(name, trtp.TensorDesc) for name in launch.inputs]
    return _with_signature(description, inputs, _tensors(trtp, launch.outputs))


def _implement(trtp: Any, launch: CompiledLaunch, ptx: str) -> Any:
    """Return the function that tells TensorRT the kernel, grid and block of a launch."""

    def implementation(*arguments: Any) -> Any:
        """Return the kernel and its launch parameters; the third axis of the grid is the batch."""
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
    """Return the type annotation for a tuple of tensor descriptors, one per name."""
    return types.GenericAlias(tuple, (trtp.TensorDesc,) * len(names))


def _with_signature(function: Any, parameters: Sequence[tuple[str, Any]], returns: Any) -> Any:
    """Set the signature of a function, from which TensorRT reads names and types, and return the function."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments: Sequence[inspect.Parameter] = [inspect.Parameter(n, kind, annotation=a) for n, a in parameters]
    function.__signature__ = inspect.Signature(arguments, return_annotation=returns)
    return function
