"""A GPU that is not there, and cuda-python and pycuda on it: memory, streams, events, graphs with the real ones' rules.

Device memory is memory of this process, so engines of the fake TensorRT compute real results in it. What is put into a
stream runs at once, or is recorded while the stream is captured. Errors are put in by name of the function of CUDA's
runtime API (`fail`), and a lost device fails everything, as a real one does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import itertools
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.arrays import bytes_at
from sparsifiner_edge.runtime import cuda

_CODES = {
    "cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35,
    "cudaErrorNoDevice": 100, "cudaErrorInvalidResourceHandle": 400, "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchFailure": 719,
}  # fmt: skip


class CudaError(Exception):
    """An error of CUDA by its name in the runtime API, such as "cudaErrorMemoryAllocation"."""


@dataclasses.dataclass
class Gpu:
    """One device; the defaults are those of an Orin. `fail`: function of CUDA -> name of the error that it gives."""

    name: str = "Orin"
    sm: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    integrated: bool = True
    driver: int = 12060
    count: int = 1
    fail: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lost, self.used, self.clock = False, 0, 0.0
        self.calls: Counter[str] = Counter()
        self._numbers = itertools.count(1000)
        self.blocks: dict[int, tuple[Any, int, str]] = {}
        self._live: dict[int, str] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._stamps: dict[int, float] = {}

    def live(self) -> dict[str, int]:
        """What is taken and not given back, by kind; empty when all is."""
        return dict(Counter([kind for _, _, kind in self.blocks.values()] + list(self._live.values())))

    def check(self, function: str) -> None:
        """Count a call, and fail it where it shall fail."""
        self.calls[function] += 1
        if function in self.fail:
            if function == "cudaStreamEndCapture":
                self._recording.clear()  # A capture that fails is over all the same.
            self.lost = self.fail[function] == "cudaErrorIllegalAddress"
            raise CudaError(self.fail[function])
        if self.lost:
            raise CudaError("cudaErrorIllegalAddress")

    def allocate(self, size: int, kind: str) -> int:
        if self.used + size > self.memory:
            raise CudaError("cudaErrorMemoryAllocation")
        block = (ctypes.c_uint8 * max(size, 1))()
        self.used += size
        self.blocks[ctypes.addressof(block)] = (block, size, kind)
        return ctypes.addressof(block)

    def free(self, pointer: int, kind: str) -> None:
        """Give memory back; what is not taken, or of another kind, is an error."""
        if pointer not in self.blocks or self.blocks[pointer][2] != kind:
            raise CudaError("cudaErrorInvalidValue")
        self.used -= self.blocks.pop(pointer)[1]

    def make(self, kind: str) -> int:
        """A stream, event, graph, engine or context."""
        number = next(self._numbers)
        self._live[number] = kind
        return number

    def drop(self, number: int, kind: str) -> None:
        if self._live.get(number) != kind:
            raise CudaError("cudaErrorInvalidResourceHandle")
        del self._live[number]
        self._graphs.pop(number, None)

    def put(self, stream: int, work: Callable[[], object], milliseconds: float = 1.0) -> None:
        """Put work into a stream."""

        def run() -> None:
            work()
            self.clock += milliseconds

        if stream in self._recording:
            self._recording[stream].append(run)
        else:
            run()

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy between two blocks; sizes beyond either are an error."""
        for pointer in (target, source):
            if pointer not in self.blocks or size > self.blocks[pointer][1]:
                raise CudaError("cudaErrorInvalidValue")
        self.put(stream, lambda: ctypes.memmove(target, source, size), 0.25)

    def captures(self, stream: int) -> bool:
        return stream in self._recording

    def graph(self, kind: str, steps: list[Callable[[], None]]) -> int:
        number = self.make(kind)
        self._graphs[number] = steps
        return number

    def launch(self, executable: int, stream: int) -> None:
        for step in self._graphs[executable]:
            self.put(stream, step, 0.0)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """CUDA's, by name, with the parameters that cuda-python gives them."""
        about = {"totalGlobalMem": self.memory, "integrated": int(self.integrated)}
        return {
            "cudaDriverGetVersion": lambda: self.driver,
            "cudaGetDeviceCount": lambda: self.count,
            "cudaSetDevice": lambda device: None,
            "cudaGetDeviceProperties": lambda device: types.SimpleNamespace(
                name=self.name.encode() + b"\0" * 8, major=self.sm[0], minor=self.sm[1], **about
            ),
            "cudaMemGetInfo": lambda: (self.memory - self.used, self.memory),
            "cudaMalloc": lambda size: self.allocate(size, "device"),
            "cudaFree": lambda devPtr: self.free(devPtr, "device"),
            "cudaHostAlloc": lambda size, flags: self.allocate(size, "host"),
            "cudaFreeHost": lambda ptr: self.free(ptr, "host"),
            "cudaHostGetDevicePointer": lambda pHost, flags: pHost,
            "cudaStreamCreateWithFlags": lambda flags: self.make("stream"),
            "cudaStreamDestroy": lambda stream: self.drop(stream, "stream"),
            "cudaStreamSynchronize": lambda stream: None,
            "cudaEventCreate": lambda: self.make("event"),
            "cudaEventDestroy": lambda event: self.drop(event, "event"),
            "cudaEventRecord": lambda event, stream: self._stamps.update({event: self.clock}),
            "cudaEventElapsedTime": lambda start, end: self._stamps[end] - self._stamps[start],
            "cudaMemcpyAsync": lambda dst, src, count, kind, stream: self.copy(dst, src, count, stream),
            "cudaStreamBeginCapture": lambda stream, mode: self._recording.update({stream: []}),
            "cudaStreamEndCapture": lambda stream: self.graph("graph", self._recording.pop(stream)),
            "cudaGraphInstantiate": lambda graph, flags: self.graph("executable graph", self._graphs[graph]),
            "cudaGraphDestroy": lambda graph: self.drop(graph, "graph"),
            "cudaGraphExecDestroy": lambda graphExec: self.drop(graphExec, "executable graph"),
            "cudaGraphLaunch": lambda graphExec, stream: self.launch(graphExec, stream),  # noqa: PLW0108 - patched
        }


def cuda_bindings(gpu: Gpu) -> types.ModuleType:
    """A module like `cuda.bindings.runtime`: functions give a status and, where there is one, a result."""
    module = types.ModuleType("cuda.bindings.runtime")
    module.cudaError_t = error = enum.IntEnum("cudaError_t", _CODES)
    module.cudaHostAllocMapped, module.cudaStreamNonBlocking = 2, 1
    module.cudaMemcpyKind = enum.IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    module.cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    module.cudaGetErrorString = lambda status: (error.cudaSuccess, f"text of {status.name}".encode())

    def function(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                gpu.check(name)
                result = body(*arguments)
            except CudaError as failed:
                return (error[str(failed)],)
            return (error.cudaSuccess, *(result if isinstance(result, tuple) else () if result is None else (result,)))

        return call

    for name, body in gpu.functions().items():
        setattr(module, name, function(name, body))
    return module


def install_cuda(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, release: str = "12.6.2") -> types.ModuleType:
    """The fake of cuda-python for one test, of this release."""
    made, parent = cuda_bindings(gpu), types.ModuleType("cuda.bindings")
    parent.__version__ = release
    for name, module in (("cuda", types.ModuleType("cuda")), (parent.__name__, parent), (made.__name__, made)):
        monkeypatch.setitem(sys.modules, name, module)
    return made


class PyCudaError(Exception):
    """`pycuda.driver.Error`."""


def install_pycuda(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """The fake of pycuda for one test, in cuda-python's place: what it makes frees itself with its last reference."""
    runtime = cuda_bindings(gpu)

    def call(function: str, *arguments: Any) -> Any:
        status, *values = getattr(runtime, function)(*arguments)
        if status:
            raise PyCudaError(f"{function} failed: {'out of memory' if status == 2 else 'unknown'}")
        return values[0] if len(values) == 1 else tuple(values)

    class Made:
        def __init__(self, make: str, free: str, *arguments: Any) -> None:
            self.handle, self._free = call(make, *arguments), free

        def __int__(self) -> int:
            return self.handle

        get_device_pointer = __int__

        def free(self) -> None:
            if self._free:
                free, self._free = self._free, ""
                call(free, self.handle)

        def __del__(self) -> None:
            if hasattr(self, "handle"):
                self.free()

    class Stream(Made):
        def __init__(self, flags: int) -> None:
            super().__init__("cudaStreamCreateWithFlags", "cudaStreamDestroy", flags)

        def synchronize(self) -> None:
            call("cudaStreamSynchronize", self.handle)

    class Event(Made):
        def __init__(self) -> None:
            super().__init__("cudaEventCreate", "cudaEventDestroy")

        def record(self, stream: Stream) -> None:
            call("cudaEventRecord", self.handle, stream.handle)

        def time_till(self, end: Event) -> float:
            return call("cudaEventElapsedTime", self.handle, end.handle)

    class Pinned(np.ndarray[Any, Any]):
        base = property(lambda self: self.owner)

    def pinned(size: int, dtype: Any, mem_flags: int) -> Any:
        owner = Made("cudaHostAlloc", "cudaFreeHost", size, mem_flags)
        array = bytes_at(owner.handle, size).view(Pinned)
        array.owner = owner
        return array

    def device(number: int) -> Any:
        one = call("cudaGetDeviceProperties", number)
        return types.SimpleNamespace(
            name=lambda: gpu.name, compute_capability=lambda: gpu.sm, total_memory=lambda: one.totalGlobalMem,
            get_attribute=lambda _: one.integrated,
            retain_primary_context=lambda: types.SimpleNamespace(push=lambda: None, pop=lambda: None),
        )  # fmt: skip

    device.count = lambda: call("cudaGetDeviceCount")
    package, module = types.ModuleType("pycuda"), types.ModuleType("pycuda.driver")
    vars(module).update(
        Error=PyCudaError, Stream=Stream, Event=Event, Device=device, pagelocked_empty=pinned, init=lambda: None,
        host_alloc_flags=types.SimpleNamespace(DEVICEMAP=2), device_attribute=types.SimpleNamespace(INTEGRATED=18),
        get_driver_version=lambda: call("cudaDriverGetVersion"), mem_get_info=lambda: call("cudaMemGetInfo"),
        mem_alloc=lambda size: Made("cudaMalloc", "cudaFree", size),
        memcpy_htod_async=lambda dest, src, stream: gpu.copy(dest, src.ctypes.data, src.nbytes, stream.handle),
        memcpy_dtoh_async=lambda dest, src, stream: gpu.copy(dest.ctypes.data, src, dest.nbytes, stream.handle),
    )  # fmt: skip
    package.VERSION_TEXT = "2026.1"
    for name, one in (("cuda", None), ("cuda.bindings", None), (package.__name__, package), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, one)


def install_driver(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A driver's library that supports CUDA up to `number`, such as 12060."""

    def version(pointer: Any) -> int:
        pointer._obj.value = number
        return 0

    library = types.SimpleNamespace(cuDriverGetVersion=version)
    ours = types.SimpleNamespace(**vars(ctypes) | {"CDLL": lambda _: library})
    monkeypatch.setattr(cuda, "ctypes", ours)
