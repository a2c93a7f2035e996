"""A TensorRT that is not there: control flow, and real results. An engine is a profile and the model, which ONNX
Runtime evaluates in the fake GPU's memory. `tests/tensorrt/test_bindings.py` holds its names against the real wheels.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import json
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsifiner_edge.bundle.kernels import NAMESPACE
from sparsifiner_edge.runtime.tensorrt import plugin as tensorrt_plugin
from tests.fakes.gpu import CudaError, Gpu

VERSIONS = {"10.3": "10.3.0", "10.9": "10.9.0.34", "11.4": "11.4.0.106"}
"""JetPack 6's; the first with plugins ahead of time; the newest."""
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "UINT8": np.uint8}
ENUMS = {
    "BuilderFlag": ["TF32"], "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"], "MemoryPoolType": ["WORKSPACE"],
    "TensorIOMode": ["INPUT", "OUTPUT"], "DataType": [*_TYPES, "BF16"],
}  # fmt: skip


@dataclasses.dataclass
class Behaviour:
    """What goes wrong, and what the fake saw.

    Attributes:
        build: error messages of a build that gives nothing; None builds. warnings: what a build warns of.
        refuse: beginnings of operators that the parser refuses.
        context: error messages when no context can be made.
        enqueue: error messages of a run that fails. recordable: a run may be captured.
        original: evaluated in the place of a model that holds launches of kernels.
        milliseconds: of a run, by beginnings of operators in the model: the first that is in it counts.
        seen: what was set on the way, by name.
    """

    build: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    context: tuple[str, ...] | None = None
    enqueue: tuple[str, ...] | None = None
    recordable: bool = True
    original: bytes = b""
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, version: str = "10.3", behaviour: Behaviour | None = None
) -> types.ModuleType:
    """The fake of a TensorRT version for one test, with its module `plugin` where it has plugins ahead of time."""
    behaviour = behaviour or Behaviour()
    trt, plugin = make_tensorrt(gpu, behaviour), types.ModuleType("tensorrt.plugin")
    trt.__version__ = VERSIONS[version]
    for kind in ("register", "aot_impl"):
        seen = behaviour.seen.setdefault(kind, [])
        setattr(plugin, kind, lambda name, seen=seen: lambda _: seen.append(name))
    for kind in ("TensorDesc", "KernelLaunchParams", "SymIntExprs"):
        setattr(plugin, kind, type(kind, (), {}))
    if version != "10.3":
        trt.QuickPluginCreationRequest = object
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.setattr(tensorrt_plugin, "_registered", set())
    return trt


def make_tensorrt(gpu: Gpu, behaviour: Behaviour) -> types.ModuleType:
    """A module like `tensorrt`, as far as this package uses it."""
    trt = types.ModuleType("tensorrt")
    for kind, members in ENUMS.items():
        setattr(trt, kind, enum.IntEnum(kind, {member: number for number, member in enumerate(members)}))
    trt.nptype = _numpy_type
    for made in (*_builder(trt, behaviour), *_runtime(trt, gpu, behaviour)):
        setattr(trt, made.__name__, made)
    return trt


def _numpy_type(kind: Any) -> Any:
    if kind.name not in _TYPES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _TYPES[kind.name]


def _shape(value: Any) -> tuple[int, ...]:
    """Of a graph's input or output; -1 where dynamic."""
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def _builder(trt: Any, b: Behaviour) -> list[type]:
    """What a build uses."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content

    class IOptimizationProfile:
        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            b.seen["profile"] = {input: [min, opt, max]}

    class IBuilderConfig:
        def clear_flag(self, flag: Any) -> None:
            b.seen["cleared"] = flag.name

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            b.seen[pool.name] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            return 0

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            damaged = bool(serialized_timing_cache) and not serialized_timing_cache.startswith(b"times ")
            return None if damaged else ITimingCache(serialized_timing_cache or b"times of nothing")

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            b.seen["timing cache"] = cache.serialize()
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return ITimingCache(b"times of a build")

    class ITensor:
        def __init__(self, value: Any) -> None:
            self.name, self.shape = value.name, _shape(value)

    class INetworkDefinition:
        num_inputs = 1

        def get_input(self, index: int) -> ITensor:
            return ITensor(self._model.graph.input[index])

    class ParserError:
        def __init__(self, node: Any) -> None:
            self._node = node

        def node(self) -> int:
            return 0

        def node_name(self) -> str:
            return str(self._node.name)

        def node_operator(self) -> str:
            return str(self._node.op_type)

        def desc(self) -> str:
            return "no importer\n registered for op"

        def local_function_stack_size(self) -> int:
            return len(self.local_function_stack())

        def local_function_stack(self) -> list[str]:
            return ["SparseAttention"] if self._node.domain else []

    class OnnxParser:
        def __init__(self, network: Any, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def parse(self, model: bytes) -> bool:
            self._network._model = onnx.load_from_string(model)
            self._errors = [
                ParserError(node) for node in self._network._model.graph.node if node.op_type.startswith(b.refuse)
            ]
            return not self._errors

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> INetworkDefinition:
            assert flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            for message in b.warnings:
                self._logger.log(ILogger.WARNING, message)
            for message in b.build or ():
                self._logger.log(ILogger.ERROR, message)
            profile = json.dumps(b.seen.pop("profile", {})).encode()
            return None if b.build is not None else profile + b"\n" + network._model.SerializeToString()

    return [
        ILogger, ITimingCache, IOptimizationProfile, IBuilderConfig, ITensor, INetworkDefinition, ParserError,
        OnnxParser, Builder,
    ]  # fmt: skip


@functools.lru_cache(maxsize=8)
def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _runtime(trt: Any, gpu: Gpu, b: Behaviour) -> list[type]:
    """What a run uses."""

    class Freed:
        """What goes with its last reference."""

        def __init__(self) -> None:
            self._number = gpu.make(type(self).__name__)

        def __del__(self) -> None:
            if hasattr(self, "_number"):
                gpu.drop(self._number, type(self).__name__)

    class ICudaEngine(Freed):
        def __init__(self, content: bytes) -> None:
            profile, _, model = content.partition(b"\n")
            self._profile, self._model = json.loads(profile), onnx.load_from_string(model)
            graph = self._model.graph
            self._values = {value.name: value for value in (*graph.input, *graph.output)}
            super().__init__()

        @property
        def num_io_tensors(self) -> int:
            return len(self._values)

        def get_tensor_name(self, index: int) -> str:
            return list(self._values)[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return _shape(self._values[name])

        def get_tensor_dtype(self, name: str) -> Any:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self._values[name].type.tensor_type.elem_type)
            return next(trt.DataType[name] for name, kind in _TYPES.items() if np.dtype(kind) == dtype)

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name == self._model.graph.input[0].name else trt.TensorIOMode.OUTPUT

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return self._profile.get(name, [self.get_tensor_shape(name)] * 3)

        def create_execution_context(self) -> Any:
            for message in b.context or ():
                trt._logger.log(trt.ILogger.ERROR, message)
            return None if b.context is not None else IExecutionContext(self)

    class IExecutionContext(Freed):
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine, self._shape, self._addresses = engine, (), dict[str, int]()
            super().__init__()

        def set_input_shape(self, name: str, shape: Any) -> bool:
            self._shape = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(self._shape[0] if size == -1 else size for size in self._engine.get_tensor_shape(name))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            b.seen["runs"] = b.seen.get("runs", 0) + 1
            messages = b.enqueue or ()
            if gpu.captures(stream_handle) and not b.recordable:
                messages = ("not permitted while captured",)
            try:
                gpu.check("enqueue")
            except CudaError as error:
                messages = (f"Cuda Runtime ({error}, an illegal memory access was encountered)",)
            for message in messages:
                trt._logger.log(trt.ILogger.ERROR, message)
            if not messages:
                operators = [node.op_type for node in self._engine._model.graph.node]
                took = [ms for name, ms in b.milliseconds.items() if any(kind.startswith(name) for kind in operators)]
                gpu.put(stream_handle, self._compute, (*took, 2.0)[0])
            return not messages

        def _compute(self) -> None:
            model = self._engine._model
            name, plugins = model.graph.input[0].name, any(node.domain == NAMESPACE for node in model.graph.node)
            session = _session(b.original if plugins else model.SerializeToString())
            for output in model.graph.output:
                np.copyto(self._view(output.name), session.run([output.name], {name: np.array(self._view(name))})[0])

        def _view(self, name: str) -> Any:
            shape, dtype = self.get_tensor_shape(name), np.dtype(_numpy_type(self._engine.get_tensor_dtype(name)))
            memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            # Like the real one, it comes up without a driver; unlike it, it does not end the process on use.
            assert gpu.calls, "an object of TensorRT before CUDA has answered"
            trt._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            return ICudaEngine(serialized_engine)

    return [ICudaEngine, IExecutionContext, Runtime]
