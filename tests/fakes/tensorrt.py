"""A TensorRT that is not there: the names and enums of a recorded version, control flow, and real results.

An "engine" is a header and the ONNX model; running it evaluates the model with ONNX Runtime in the fake GPU's memory. A
class has no member that the recorded surface lacks, an enum exactly the recorded ones, so code that uses a name which a
version lacks fails here as it would there.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import functools
import json
import struct
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from sparsifiner_edge.runtime.kernels import NAMESPACE
from tests.fakes.gpu import CudaError, Gpu
from tests.fakes.record_tensorrt import load


@dataclasses.dataclass
class Behaviour:
    """What goes wrong, and what the fake saw.

    Attributes:
        build: error messages of a build that gives nothing; None builds.
        warnings: what a build warns of.
        refuse: operators that the parser refuses.
        context: error messages when no context can be made.
        enqueue: error messages of a run that fails.
        original: evaluated in the place of a model that holds launches of kernels.
        milliseconds: of a run, by the operators in the model: the first that is in it counts.
        seen: what was set on the way, by name.
    """

    build: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    refuse: tuple[str, ...] = ()
    context: tuple[str, ...] | None = None
    enqueue: tuple[str, ...] | None = None
    original: bytes = b""
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)


def make_tensorrt(name: str, gpu: Gpu, behaviour: Behaviour | None = None) -> types.ModuleType:
    """A module like `tensorrt` of the recorded version `name`, such as "10.3"."""
    surface = load(name)
    trt = types.ModuleType("tensorrt")
    trt.__version__ = surface["version"]
    for kind, members in surface["enums"].items():
        setattr(trt, kind, enum.IntEnum(kind, {member: number for number, member in enumerate(members)}))
    trt.nptype = lambda kind: _numpy_type(trt, kind)
    for cls in _classes(trt, gpu, behaviour or Behaviour()):
        if cls.__name__ in surface["classes"]:
            known = surface["classes"][cls.__name__]
            for member in [m for m in vars(cls) if not m.startswith("_") and m not in known]:
                delattr(cls, member)
            setattr(trt, cls.__name__, cls)
    return trt


def make_plugin_module(name: str, seen: dict[str, Any]) -> types.ModuleType | None:
    """A module like `tensorrt.plugin` of the recorded version that keeps what is registered, if there is one."""
    known = load(name)["plugin"]
    if not known:
        return None
    plugin = types.ModuleType("tensorrt.plugin")

    def keeper(kind: str) -> Any:
        def decorator(plugin_id: str) -> Any:
            return lambda function: seen.setdefault(kind, {}).update({plugin_id: function})

        return decorator

    for public in known:
        setattr(plugin, public, keeper(public) if public in ("register", "aot_impl") else type(public, (), {}))
    return plugin


_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


def _numpy_type(trt: Any, kind: Any) -> Any:
    if kind.name not in _TYPES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _TYPES[kind.name]


def _data_type(trt: Any, element: int) -> Any:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    return next(trt.DataType[name] for name, kind in _TYPES.items() if np.dtype(kind) == dtype)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def _evaluate(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> dict[str, Any]:
    session = _session(model.SerializeToString())
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: np.array(value) for name, value in inputs.items()}), strict=True))


@functools.lru_cache(maxsize=8)
def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _classes(trt: Any, gpu: Gpu, b: Behaviour) -> list[type]:
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, msg: str) -> None:
            raise NotImplementedError

    class IProgressMonitor:
        pass

    class IProfiler:
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    class IHostMemory(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> IHostMemory:
            return IHostMemory(self.content)

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.shapes[input] = [tuple(shape) for shape in (min, opt, max)]

    class IBuilderConfig:
        builder_optimization_level = 3
        profiling_verbosity = None
        hardware_compatibility_level = None
        progress_monitor = None

        def __init__(self) -> None:
            self._seen = b.seen
            self._cache: ITimingCache | None = None

        def set_flag(self, flag: Any) -> None:
            b.seen.setdefault("flags", set()).add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            b.seen.setdefault("cleared", set()).add(flag.name)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            b.seen[pool.name] = pool_size

        def add_optimization_profile(self, profile: Any) -> int:
            b.seen["profile"] = dict(profile.shapes)
            return 0

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            damaged = bool(serialized_timing_cache) and not serialized_timing_cache.startswith(b"times ")
            return None if damaged else ITimingCache(serialized_timing_cache or b"times of nothing")

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            fits = b"other device" not in cache.content
            self._cache = cache if fits else None
            return fits

        def get_timing_cache(self) -> Any:
            return self._cache and ITimingCache(b"times of a build")

    class ITensor:
        def __init__(self, value: Any) -> None:
            self.name, self.shape = value.name, _shape(value)

    class INetworkDefinition:
        def __init__(self) -> None:
            self.model: onnx.ModelProto | None = None

        @property
        def num_inputs(self) -> int:
            return len(self.model.graph.input)

        @property
        def num_layers(self) -> int:
            return len(self.model.graph.node)

        def get_input(self, index: int) -> ITensor:
            return ITensor(self.model.graph.input[index])

    class ParserError:
        def __init__(self, number: int, node: Any) -> None:
            self._number, self._node = number, node

        def node(self) -> int:
            return self._number

        def node_name(self) -> str:
            return str(self._node.name)

        def node_operator(self) -> str:
            return str(self._node.op_type)

        def desc(self) -> str:
            return "no importer\n registered for op"

        def local_function_stack_size(self) -> int:
            return 1 if self._node.domain else 0

        def local_function_stack(self) -> list[str]:
            return ["SparseAttention"] if self._node.domain else []

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def parse(self, model: bytes, path: str | None = None) -> bool:
            parsed = onnx.load_from_string(bytes(model))
            nodes = list(enumerate(parsed.graph.node))
            self._errors = [ParserError(number, node) for number, node in nodes if node.op_type in b.refuse]
            self._network.model = parsed
            return not self._errors

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            assert flags == 1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            return INetworkDefinition()

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            for name in ("builder_optimization_level", "profiling_verbosity", "hardware_compatibility_level"):
                b.seen[name] = getattr(config, name)
            for message in b.warnings:
                self._logger.log(ILogger.WARNING, message)
            monitor = config.progress_monitor
            for phase, parent, steps in (("Build", None, 2), ("Tactics", "Build", 3), ("One", "Tactics", 1)):
                monitor.phase_start(phase, parent, steps)
                for step in range(steps):
                    if not monitor.step_complete(phase, step):
                        self._logger.log(ILogger.ERROR, "Build was cancelled")
                        return None
                monitor.phase_finish(phase)
            for message in b.build or ():
                self._logger.log(ILogger.ERROR, message)
            if b.build is not None:
                return None
            header = {"version": trt.__version__, "sm": list(gpu.sm), "profile": b.seen.pop("profile", {})}
            text = json.dumps(header).encode()
            return IHostMemory(struct.pack("<I", len(text)) + text + network.model.SerializeToString())

    class ICudaEngine:
        def __init__(self, content: bytes) -> None:
            (size,) = struct.unpack_from("<I", content)
            self._header = json.loads(content[4 : 4 + size])
            self._model = onnx.load_from_string(content[4 + size :])
            graph = self._model.graph
            self._values = {value.name: value for value in (*graph.input, *graph.output)}
            self._inputs = {value.name for value in graph.input}
            self._number = gpu.make("engine")

        def __del__(self) -> None:
            if hasattr(self, "_number"):
                gpu.drop(self._number, "engine")

        @property
        def num_io_tensors(self) -> int:
            return len(self._values)

        def get_tensor_name(self, index: int) -> str:
            return list(self._values)[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return _shape(self._values[name])

        def get_tensor_dtype(self, name: str) -> Any:
            return _data_type(trt, self._values[name].type.tensor_type.elem_type)

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0
            assert name in self._inputs
            return self._header["profile"].get(name, [_shape(self._values[name])] * 3)

        def create_execution_context(self) -> Any:
            for message in b.context or ():
                trt._logger.log(ILogger.ERROR, message)
            return None if b.context is not None else IExecutionContext(self)

        def create_engine_inspector(self) -> Any:
            return EngineInspector(self)

    class EngineInspector:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine

        def get_engine_information(self, format: Any) -> str:
            assert format == trt.LayerInformationFormat.JSON
            return json.dumps({"Layers": [node.op_type for node in self._engine._model.graph.node], "Bindings": []})

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._number = gpu.make("context")
            self.profiler: IProfiler | None = None
            self.enqueue_emits_profile = True

        def __del__(self) -> None:
            gpu.drop(self._number, "context")

        def set_input_shape(self, name: str, shape: Any) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            fits = all(a <= s <= z for a, s, z in zip(least, shape, most, strict=True))
            if not fits:
                trt._logger.log(ILogger.ERROR, f"IExecutionContext::setInputShape: {name} is out of profile range")
                return False
            self._shapes[name] = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self._shapes:
                return self._shapes[name]
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            b.seen["runs"] = b.seen.get("runs", 0) + 1
            try:
                gpu.check("enqueue")
            except CudaError as error:
                trt._logger.log(ILogger.ERROR, f"Cuda Runtime ({error}, an illegal memory access was encountered)")
                return False
            for message in b.enqueue or ():
                trt._logger.log(ILogger.ERROR, message)
            if b.enqueue is not None:
                return False
            operators = {node.op_type for node in self._engine._model.graph.node}
            taken = next((ms for name, ms in b.milliseconds.items() if name in operators), 2.0)
            gpu.put(stream_handle, self._compute, taken)
            if self.profiler is not None and self.enqueue_emits_profile:
                for number, node in enumerate(self._engine._model.graph.node):
                    self.profiler.report_layer_time(node.name or f"{node.op_type}_{number}", 0.5 + number)
            return True

        def _compute(self) -> None:
            inputs = {name: self._view(name) for name in self._engine._inputs}
            model = self._engine._model
            if any(node.domain == NAMESPACE for node in model.graph.node):
                model = onnx.load_from_string(b.original)
            for name, value in _evaluate(model, inputs).items():
                np.copyto(self._view(name), value)

        def _view(self, name: str) -> Any:
            shape = self.get_tensor_shape(name)
            dtype = np.dtype(_numpy_type(trt, self._engine.get_tensor_dtype(name)))
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_uint8 * size).from_address(self._addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: ILogger) -> None:
            # Like the real one, it comes up without a driver; unlike it, it does not end the process on use.
            assert gpu.calls, "an object of TensorRT before CUDA has answered"
            self._logger = trt._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            content = bytes(serialized_engine)
            b.seen["host code"] = self.engine_host_code_allowed
            try:
                engine = ICudaEngine(content)
            except Exception:
                self._logger.log(
                    ILogger.ERROR, "IRuntime::deserializeCudaEngine: magicTag mismatch, serialization assertion"
                )
                return None
            if engine._header["version"] != trt.__version__ and not self.engine_host_code_allowed:
                self._logger.log(ILogger.ERROR, "The engine plan file is not compatible with this version of TensorRT")
                return None
            return engine

    return [
        ILogger, IProgressMonitor, IProfiler, IHostMemory, ITimingCache, IOptimizationProfile, IBuilderConfig, ITensor,
        INetworkDefinition, ParserError, OnnxParser, Builder, ICudaEngine, EngineInspector, IExecutionContext, Runtime,
    ]  # fmt: skip
