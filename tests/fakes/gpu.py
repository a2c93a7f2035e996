"""A fake GPU with fake cuda-python and pycuda: memory, streams, events and graphs with the rules of the real ones.

Device memory is memory of this process, so engines of the fake TensorRT compute real results in it. Work put into a
stream runs at once, or is recorded while the stream is captured. Errors are injected by the name of a CUDA runtime
function (`fail`), and a lost device fails every call, as a real one does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.runtime import cuda

STATUS = enum.IntEnum(
    "cudaError_t",
    "cudaSuccess cudaErrorInvalidValue cudaErrorMemoryAllocation cudaErrorInsufficientDriver cudaErrorNoDevice "
    "cudaErrorInvalidResourceHandle cudaErrorIllegalAddress cudaErrorLaunchFailure",
    start=0,
)


class CudaError(Exception):
    """An error of CUDA by its name in the runtime API, such as "cudaErrorMemoryAllocation"."""


@dataclasses.dataclass
class Gpu:
    """One device; the defaults are those of an Orin. `fail` maps a CUDA function to the name of its error."""

    name: str = "Orin"
    sm: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    integrated: bool = True
    driver: int = 12060
    count: int = 1
    fail: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lost, self.clock, self.calls = False, 0.0, Counter[str]()
        self.taken: dict[int, tuple[str, Any]] = {}
        self._stamps: dict[int, float] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    def live(self) -> dict[str, int]:
        """Return the objects that are not released, by kind; empty if there are none."""
        return dict(Counter(kind for kind, _ in self.taken.values()))

    def check(self, function: str) -> None:
        """Count a call, and fail it if requested."""
        self.calls[function] += 1
        if function in self.fail:
            self.lost = self.fail[function] == "cudaErrorIllegalAddress"
            raise CudaError(self.fail[function])
        if self.lost:
            raise CudaError("cudaErrorIllegalAddress")

    def make(self, kind: str, size: int = 0) -> int:
        """Allocate memory of a kind, or a stream, event, graph, engine or context; return its address."""
        if size > self.free():
            raise CudaError("cudaErrorMemoryAllocation")
        block = (ctypes.c_uint8 * max(size, 1))()
        self.taken[ctypes.addressof(block)] = (kind, block)
        return ctypes.addressof(block)

    def drop(self, address: int, kind: str) -> None:
        """Release an object; an unknown address or another kind is an error."""
        if self.taken.get(address, ("",))[0] != kind:
            raise CudaError("cudaErrorInvalidResourceHandle")
        del self.taken[address]
        self._graphs.pop(address, None)

    def hold(self, made: Any, kind: str) -> None:
        """Hold an object as long as a Python object lives."""
        weakref.finalize(made, self.drop, self.make(kind), kind)

    def free(self) -> int:
        return self.memory - sum(len(block) for kind, block in self.taken.values() if kind in ("host", "device"))

    def put(self, stream: int, work: Callable[[], object], milliseconds: float = 1.0) -> None:
        """Put work into a stream."""

        def run() -> None:
            work()
            self.clock += milliseconds

        if stream in self.recording:
            self.recording[stream].append(run)
        else:
            run()

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy between two blocks; sizes beyond either are an error."""
        if any(size > len(self.taken.get(pointer, ("", ""))[1]) for pointer in (target, source)):
            raise CudaError("cudaErrorInvalidValue")
        self.put(stream, lambda: ctypes.memmove(target, source, size), 0.25)

    def graph(self, kind: str, steps: list[Callable[[], None]]) -> int:
        number = self.make(kind)
        self._graphs[number] = steps
        return number

    def launch(self, executable: int, stream: int) -> None:
        for step in self._graphs[executable]:
            self.put(stream, step, 0.0)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return CUDA's functions by name, with the parameters of cuda-python."""
        about = {"major": self.sm[0], "minor": self.sm[1], "integrated": self.integrated}
        return {
            "cudaDriverGetVersion": lambda: self.driver,
            "cudaGetDeviceCount": lambda: self.count,
            "cudaSetDevice": lambda device: None,
            "cudaGetDeviceProperties": lambda device: SimpleNamespace(name=self.name.encode() + b"\0" * 8, **about),
            "cudaMemGetInfo": lambda: (self.free(), self.memory),
            "cudaMalloc": lambda size: self.make("device", size),
            "cudaFree": lambda devPtr: self.drop(devPtr, "device"),
            "cudaHostAlloc": lambda size, flags: self.make("host", size),
            "cudaFreeHost": lambda ptr: self.drop(ptr, "host"),
            "cudaHostGetDevicePointer": lambda pHost, flags: pHost,
            "cudaStreamCreateWithFlags": lambda flags: self.make("stream"),
            "cudaStreamDestroy": lambda stream: self.drop(stream, "stream"),
            "cudaStreamSynchronize": lambda stream: None,
            "cudaEventCreate": lambda: self.make("event"),
            "cudaEventDestroy": lambda event: self.drop(event, "event"),
            "cudaEventRecord": lambda event, stream: self._stamps.update({event: self.clock}),
            "cudaEventElapsedTime": lambda start, end: self._stamps[end] - self._stamps[start],
            "cudaMemcpyAsync": lambda dst, src, count, kind, stream: self.copy(dst, src, count, stream),
            "cudaStreamBeginCapture": lambda stream, mode: self.recording.update({stream: []}),
            "cudaStreamEndCapture": lambda stream: self.graph("graph", self.recording.pop(stream)),
            "cudaGraphInstantiate": lambda graph, flags: self.graph("executable graph", self._graphs[graph]),
            "cudaGraphDestroy": lambda graph: self.drop(graph, "graph"),
            "cudaGraphExecDestroy": lambda graphExec: self.drop(graphExec, "executable graph"),
            "cudaGraphLaunch": lambda graphExec, stream: self.launch(graphExec, stream),  # noqa: PLW0108 - patched
        }

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a CUDA function; return its status and, if there is one, a result."""
        try:
            self.check(name)
            result = self.functions()[name](*arguments)
        except CudaError as failed:
            return (STATUS[str(failed)],)
        return (STATUS.cudaSuccess, *(result if isinstance(result, tuple) else () if result is None else (result,)))


def cuda_bindings(gpu: Gpu) -> SimpleNamespace:
    """Return a replacement of `cuda.bindings.runtime`."""
    return SimpleNamespace(
        cudaHostAllocMapped=2,
        cudaStreamNonBlocking=1,
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
        cudaGetErrorString=lambda status: (STATUS.cudaSuccess, f"text of {status.name}".encode()),
        **{name: lambda *arguments, name=name: gpu.call(name, *arguments) for name in gpu.functions()},
    )


def install_cuda(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, release: str = "12.6.2") -> SimpleNamespace:
    """Install the fake of this cuda-python release for one test."""
    made, package = cuda_bindings(gpu), SimpleNamespace(__version__=release)
    _install(monkeypatch, ("cuda", SimpleNamespace()), ("cuda.bindings", package), ("cuda.bindings.runtime", made))
    return made


def _install(monkeypatch: pytest.MonkeyPatch, *modules: tuple[str, Any]) -> None:
    for name, module in modules:
        monkeypatch.setitem(sys.modules, name, module)


class PyCudaError(Exception):
    """Replacement of `pycuda.driver.Error`."""


def install_pycuda(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """Install the fake of pycuda for one test instead of cuda-python; its objects free themselves."""

    def call(function: str, *arguments: Any) -> Any:
        status, *values = gpu.call(function, *arguments)
        if status:
            words = "out of memory" if status == STATUS.cudaErrorMemoryAllocation else "unknown"
            raise PyCudaError(f"{function} failed: {words}")
        return values[0] if len(values) == 1 else tuple(values)

    class Made:
        """A stream, an event or memory."""

        def __init__(self, make: str, free: str, *arguments: Any) -> None:
            handle = self.handle = call(make, *arguments)
            self.free = weakref.finalize(self, call, free, handle)
            self.synchronize = lambda: call("cudaStreamSynchronize", handle)
            self.record = lambda stream: call("cudaEventRecord", handle, stream.handle)
            self.time_till = lambda end: call("cudaEventElapsedTime", handle, end.handle)

        def __int__(self) -> int:
            return self.handle

        get_device_pointer = __int__

    def pinned(size: int, dtype: Any, mem_flags: int) -> Any:
        owner: Any = Made("cudaHostAlloc", "cudaFreeHost", size, mem_flags)
        owner.__array_interface__ = {"data": (owner.handle, False), "shape": (size,), "typestr": "|u1", "version": 3}
        return np.asarray(owner)  # whose `base` is its owner

    def device(number: int) -> Any:
        one = call("cudaGetDeviceProperties", number)
        return SimpleNamespace(
            name=lambda: gpu.name,
            compute_capability=lambda: gpu.sm,
            get_attribute=lambda _: one.integrated,
            retain_primary_context=lambda: SimpleNamespace(push=lambda: None, pop=lambda: None),
        )

    device.count = lambda: call("cudaGetDeviceCount")
    driver = ModuleType("pycuda.driver")  # which, unlike a namespace, is hashable
    vars(driver).update(
        Error=PyCudaError,
        Device=device,
        pagelocked_empty=pinned,
        init=lambda: None,
        Stream=lambda flags: Made("cudaStreamCreateWithFlags", "cudaStreamDestroy", flags),
        Event=lambda: Made("cudaEventCreate", "cudaEventDestroy"),
        host_alloc_flags=SimpleNamespace(DEVICEMAP=2),
        device_attribute=SimpleNamespace(INTEGRATED=18),
        get_driver_version=lambda: call("cudaDriverGetVersion"),
        mem_get_info=lambda: call("cudaMemGetInfo"),
        mem_alloc=lambda size: Made("cudaMalloc", "cudaFree", size),
        memcpy_htod_async=lambda dest, src, stream: gpu.copy(dest, src.ctypes.data, src.nbytes, stream.handle),
        memcpy_dtoh_async=lambda dest, src, stream: gpu.copy(dest.ctypes.data, src, dest.nbytes, stream.handle),
    )
    package = SimpleNamespace(VERSION_TEXT="2026.1")
    _install(monkeypatch, ("cuda", None), ("cuda.bindings", None), ("pycuda", package), ("pycuda.driver", driver))


def install_driver(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Install a driver library that supports CUDA up to `number`, such as 12060."""

    def version(pointer: Any) -> int:
        pointer._obj.value = number
        return 0

    library = SimpleNamespace(cuDriverGetVersion=version)
    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda _: library}))
