"""The two Python packages for CUDA as far as the adapters use them, on a fake GPU.

`cuda_bindings(gpu)` has the surface of `cuda.bindings.runtime`, which a test compares with the real module;
`pycuda_driver(gpu)` that of `pycuda.driver`, modelled on its source (wrap_cudadrv.cpp and cuda.hpp of version 2026.1).
"""

from __future__ import annotations

import enum
import types
from typing import Any

import numpy as np

from tests.fakes.gpu import CudaError, Gpu

_CODES = {
    "cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35,
    "cudaErrorNoDevice": 100, "cudaErrorInvalidDevice": 101, "cudaErrorInvalidResourceHandle": 400,
    "cudaErrorIllegalState": 401, "cudaErrorIllegalAddress": 700, "cudaErrorLaunchFailure": 719,
}  # fmt: skip
_PYCUDA_TEXTS = {
    "cudaErrorMemoryAllocation": "out of memory", "cudaErrorNoDevice": "no device",
    "cudaErrorLaunchFailure": "launch failed", "cudaErrorIllegalAddress": "invalid/unknown error code",
}  # fmt: skip


def cuda_bindings(gpu: Gpu) -> types.ModuleType:
    """A module like `cuda.bindings.runtime`: functions give a status and, where there is one, a result."""
    module = types.ModuleType("cuda.bindings.runtime")
    error = enum.IntEnum("cudaError_t", _CODES)

    def function(body: Any) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                gpu.check(body.__name__)
                result = body(*arguments)
            except CudaError as failed:
                return (error[str(failed)], None) if body.__name__ in _WITH_RESULT else (error[str(failed)],)
            if body.__name__ not in _WITH_RESULT:
                return (error.cudaSuccess,)
            return (error.cudaSuccess, *(result if isinstance(result, tuple) else (result,)))

        setattr(module, body.__name__, call)
        return call

    module.cudaError_t = error
    module.cudaHostAllocMapped, module.cudaStreamNonBlocking = 2, 1
    module.cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    module.cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    module.cudaGetErrorString = lambda status: (error.cudaSuccess, f"text of {status.name}".encode())
    for body in _functions(gpu):
        function(body)
    return module


_WITH_RESULT = {
    "cudaDriverGetVersion", "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaMemGetInfo", "cudaMalloc",
    "cudaHostAlloc", "cudaHostGetDevicePointer", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventElapsedTime",
    "cudaStreamEndCapture", "cudaGraphInstantiate",
}  # fmt: skip


def _functions(gpu: Gpu) -> list[Any]:
    def cudaDriverGetVersion() -> int:
        return gpu.driver

    def cudaGetDeviceCount() -> int:
        return gpu.count

    def cudaSetDevice(device: int) -> None:
        assert 0 <= device < gpu.count

    def cudaGetDeviceProperties(device: int) -> Any:
        return types.SimpleNamespace(
            name=gpu.name.encode() + b"\0" * 8, major=gpu.sm[0], minor=gpu.sm[1], totalGlobalMem=gpu.memory,
            integrated=int(gpu.integrated),
        )  # fmt: skip

    def cudaMemGetInfo() -> tuple[int, int]:
        return gpu.memory - gpu.used, gpu.memory

    def cudaMalloc(size: int) -> int:
        return gpu.allocate(size, "device")

    def cudaFree(devPtr: int) -> None:
        gpu.free(devPtr, "device")

    def cudaHostAlloc(size: int, flags: int) -> int:
        assert flags == 2
        return gpu.allocate(size, "host")

    def cudaFreeHost(ptr: int) -> None:
        gpu.free(ptr, "host")

    def cudaHostGetDevicePointer(pHost: int, flags: int) -> int:
        assert flags == 0
        return pHost

    def cudaStreamCreateWithFlags(flags: int) -> int:
        assert flags == 1
        return gpu.make("stream")

    def cudaStreamDestroy(stream: int) -> None:
        gpu.drop(stream, "stream")

    def cudaStreamSynchronize(stream: int) -> None:
        pass

    def cudaEventCreate() -> int:
        return gpu.make("event")

    def cudaEventDestroy(event: int) -> None:
        gpu.drop(event, "event")

    def cudaEventRecord(event: int, stream: int) -> None:
        gpu.stamp(event)

    def cudaEventElapsedTime(start: int, end: int) -> float:
        return gpu.between(start, end)

    def cudaMemcpyAsync(dst: int, src: int, count: int, kind: Any, stream: int) -> None:
        assert kind in (1, 2)
        gpu.copy(dst, src, count, stream)

    def cudaStreamBeginCapture(stream: int, mode: Any) -> None:
        assert mode == 1
        gpu.begin(stream)

    def cudaStreamEndCapture(stream: int) -> int:
        return gpu.end(stream)

    def cudaGraphInstantiate(graph: int, flags: int) -> int:
        assert flags == 0
        return gpu.instantiate(graph)

    def cudaGraphDestroy(graph: int) -> None:
        gpu.drop(graph, "graph")

    def cudaGraphExecDestroy(graphExec: int) -> None:
        gpu.drop(graphExec, "executable graph")

    def cudaGraphLaunch(graphExec: int, stream: int) -> None:
        gpu.launch(graphExec, stream)

    return [value for value in locals().values() if callable(value)]


def pycuda_driver(gpu: Gpu) -> types.ModuleType:
    """A module like `pycuda.driver`: objects that free themselves with their last reference, errors as exceptions."""
    module = types.ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    def call(function: str, body: Any) -> Any:
        try:
            gpu.check(function)
            return body()
        except CudaError as error:
            raise Error(f"{function} failed: {_PYCUDA_TEXTS.get(str(error), 'unknown')}") from error

    class Freed:
        """An object of the GPU that goes with its last reference."""

        kind = ""

        def __init__(self, *_flags: int) -> None:
            self.handle = call(f"make {self.kind}", lambda: gpu.make(self.kind))

        def __del__(self) -> None:
            if hasattr(self, "handle"):
                gpu.drop(self.handle, self.kind)

    class Stream(Freed):
        kind = "stream"

        def synchronize(self) -> None:
            call("cuStreamSynchronize", lambda: None)

    class Event(Freed):
        kind = "event"

        def record(self, stream: Stream) -> None:
            call("cuEventRecord", lambda: gpu.stamp(self.handle))

        def time_till(self, end: Any) -> float:
            return float(call("cuEventElapsedTime", lambda: gpu.between(self.handle, end.handle)))

    class Allocation:
        def __init__(self, size: int, kind: str = "device") -> None:
            self.kind, self.pointer = kind, call("cuMemAlloc", lambda: gpu.allocate(size, kind))

        def __int__(self) -> int:
            return int(self.pointer)

        def get_device_pointer(self) -> int:
            return int(self.pointer)

        def free(self) -> None:
            call("cuMemFree", lambda: gpu.free(self.pointer, self.kind))

    class Pinned(np.ndarray[Any, Any]):
        """An array whose `base` is the allocation."""

        @property
        def base(self) -> Any:
            return self._owner

    def pagelocked_empty(shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        assert mem_flags == module.host_alloc_flags.DEVICEMAP
        owner = Allocation(shape, "host")
        array = np.frombuffer(gpu.block(owner.pointer), np.uint8).view(Pinned)
        array._owner = owner
        return array

    class Context:
        def push(self) -> None:
            gpu.calls["push"] += 1

        @staticmethod
        def pop() -> None:
            gpu.calls["pop"] += 1

        def detach(self) -> None:
            gpu.calls["detach"] += 1

    class Device:
        count = staticmethod(lambda: gpu.count)

        def __init__(self, number: int) -> None:
            assert 0 <= number < gpu.count

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, int]:
            return gpu.sm

        def total_memory(self) -> int:
            return gpu.memory

        def get_attribute(self, attribute: str) -> int:
            assert attribute == "INTEGRATED"
            return int(gpu.integrated)

        def retain_primary_context(self) -> Context:
            return Context()

    def copy(target: int, source: int, size: int, stream: Stream) -> None:
        call("cuMemcpyAsync", lambda: gpu.copy(target, source, size, stream.handle))

    module.Error, module.Stream, module.Event, module.Device, module.Context = Error, Stream, Event, Device, Context
    module.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)
    module.device_attribute = types.SimpleNamespace(INTEGRATED="INTEGRATED")
    module.init = lambda: call("cuInit", lambda: None)
    module.get_driver_version = lambda: gpu.driver
    module.mem_get_info = lambda: (gpu.memory - gpu.used, gpu.memory)
    module.mem_alloc, module.pagelocked_empty = Allocation, pagelocked_empty
    module.memcpy_htod_async = lambda dest, src, stream: copy(dest, src.ctypes.data, src.nbytes, stream)
    module.memcpy_dtoh_async = lambda dest, src, stream: copy(dest.ctypes.data, src, dest.nbytes, stream)
    return module
