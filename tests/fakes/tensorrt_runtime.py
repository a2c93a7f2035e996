"""The half of the fake TensorRT that runs: engines evaluate their model with ONNX Runtime in the fake GPU's memory."""

from __future__ import annotations

import ctypes
import functools
import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from sparsifiner_edge.bundle.kernels import NAMESPACE
from tests.fakes.gpu import CudaError, Gpu
from tests.fakes.tensorrt_builder import shape

if TYPE_CHECKING:
    from tests.fakes.tensorrt import Behaviour

_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


def numpy_type(kind: Any) -> Any:
    """NumPy's type for TensorRT's."""
    if kind.name not in _TYPES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _TYPES[kind.name]


def _data_type(trt: Any, element: int) -> Any:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    return next(trt.DataType[name] for name, kind in _TYPES.items() if np.dtype(kind) == dtype)


def _evaluate(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> dict[str, Any]:
    session = _session(model.SerializeToString())
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: np.array(value) for name, value in inputs.items()}), strict=True))


@functools.lru_cache(maxsize=8)
def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def runtime_classes(trt: Any, gpu: Gpu, b: Behaviour) -> list[type]:
    """What a run uses."""

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
            return shape(self._values[name])

        def get_tensor_dtype(self, name: str) -> Any:
            return _data_type(trt, self._values[name].type.tensor_type.elem_type)

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0
            assert name in self._inputs
            return self._header["profile"].get(name, [shape(self._values[name])] * 3)

        def create_execution_context(self) -> Any:
            for message in b.context or ():
                trt._logger.log(trt.ILogger.ERROR, message)
            return None if b.context is not None else IExecutionContext(self)

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self._engine = engine
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._number = gpu.make("context")

        def __del__(self) -> None:
            gpu.drop(self._number, "context")

        def set_input_shape(self, name: str, shape: Any) -> bool:
            least, _, most = self._engine.get_tensor_profile_shape(name, 0)
            fits = all(a <= s <= z for a, s, z in zip(least, shape, most, strict=True))
            if not fits:
                trt._logger.log(trt.ILogger.ERROR, f"IExecutionContext::setInputShape: {name} is out of profile range")
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
                trt._logger.log(trt.ILogger.ERROR, f"Cuda Runtime ({error}, an illegal memory access was encountered)")
                return False
            refused = None if b.recordable or not gpu.captures(stream_handle) else ("not permitted while captured",)
            for message in b.enqueue or refused or ():
                trt._logger.log(trt.ILogger.ERROR, message)
            if (b.enqueue or refused) is not None:
                return False
            operators = {node.op_type for node in self._engine._model.graph.node}
            taken = next((ms for name, ms in b.milliseconds.items() if name in operators), 2.0)
            gpu.put(stream_handle, self._compute, taken)
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
            dtype = np.dtype(numpy_type(self._engine.get_tensor_dtype(name)))
            size = int(np.prod(shape)) * dtype.itemsize
            memory = (ctypes.c_uint8 * size).from_address(self._addresses[name])
            return np.frombuffer(memory, dtype).reshape(shape)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            # Like the real one, it comes up without a driver; unlike it, it does not end the process on use.
            assert gpu.calls, "an object of TensorRT before CUDA has answered"
            self._logger = trt._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
            content = bytes(serialized_engine)
            b.seen["deserialised"] = True
            try:
                engine = ICudaEngine(content)
            except Exception:
                self._logger.log(
                    trt.ILogger.ERROR, "IRuntime::deserializeCudaEngine: magicTag mismatch, serialization assertion"
                )
                return None
            if engine._header["version"] != trt.__version__:
                self._logger.log(
                    trt.ILogger.ERROR, "The engine plan file is not compatible with this version of TensorRT"
                )
                return None
            return engine

    return [ICudaEngine, IExecutionContext, Runtime]
