"""Adapter for NVIDIA's cuda-python (cuda.bindings 12.6 and later): the runtime API, on the primary context."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import (
    CudaDevice,
    Driver,
    PinnedBuffer,
    check_device,
    fail,
    no_driver,
    too_new,
    version_text,
)

MODULE = "cuda.bindings"


def open_device() -> Driver:
    """See `open_driver`."""
    try:
        bindings, runtime = (importlib.import_module(f"cuda.bindings{name}") for name in ("", ".runtime"))
    except Exception as error:  # Its loader has errors of its own.
        raise BackendError(f"cuda-python cannot be imported: {error}.", "Reinstall cuda-python.") from error
    return _CudaPython(runtime, str(getattr(bindings, "__version__", "")))


class _CudaPython(Driver):
    """On the module `runtime`; `release`: of cuda-python."""

    graphs = True

    def __init__(self, runtime: Any, release: str) -> None:
        self._r = runtime
        self.package = package = f"cuda-python {release}".strip()
        try:
            version = int(self._do("to read the driver's version", "cudaDriverGetVersion"))
        except RuntimeError as error:  # Up to 12.8 and from its path finder on: libcuda.so cannot be loaded.
            no_driver(package, str(error))
        if version == 0:  # How the runtime says that there is no driver.
            no_driver(package, "CUDA gives 0 as its version")
        if unfit := too_new(release, version_text(version)):
            raise BackendError(*unfit)
        check_device(int(self._do("to count devices", "cudaGetDeviceCount")))
        self.use()
        found = self._do("to describe the device", "cudaGetDeviceProperties", 0)
        name = found.name.decode("utf-8", "replace") if isinstance(found.name, bytes) else found.name
        sm = (int(found.major), int(found.minor))
        memory, integrated = int(found.totalGlobalMem), bool(found.integrated)
        self.device = CudaDevice(0, str(name).strip("\0 "), sm, memory, integrated, version_text(version))

    def _do(self, action: str, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA; returns what it gives beside its status."""
        status, *values = getattr(self._r, function)(*arguments)
        if int(status) != 0:
            meaning = self._r.cudaGetErrorString(status)[1]
            name = str(getattr(status, "name", status))
            fail(self.package, action, name, meaning.decode() if isinstance(meaning, bytes) else "")
        return values[0] if len(values) == 1 else tuple(values)

    def use(self) -> None:
        self._do("to take the device", "cudaSetDevice", 0)

    def free_bytes(self) -> int:
        return int(self._do("to read free memory", "cudaMemGetInfo")[0])

    def allocate(self, size: int, stack: ExitStack) -> int:
        pointer = int(self._do(f"to allocate {size} bytes", "cudaMalloc", size))
        stack.callback(self._do, "to free memory", "cudaFree", pointer)
        return pointer

    def allocate_host(self, size: int, stack: ExitStack) -> PinnedBuffer:
        pointer = int(self._do(f"to pin {size} bytes", "cudaHostAlloc", size, self._r.cudaHostAllocMapped))
        stack.callback(self._do, "to free pinned memory", "cudaFreeHost", pointer)
        mapped = int(self._do("to map pinned memory", "cudaHostGetDevicePointer", pointer, 0))
        return PinnedBuffer(_bytes_at(pointer, size), mapped)

    def allocate_managed(self, size: int, stack: ExitStack) -> PinnedBuffer:
        flags = self._r.cudaMemAttachGlobal
        pointer = int(self._do(f"to allocate {size} managed bytes", "cudaMallocManaged", size, flags))
        stack.callback(self._do, "to free managed memory", "cudaFree", pointer)
        return PinnedBuffer(_bytes_at(pointer, size), pointer)

    def stream(self, stack: ExitStack) -> Any:
        stream = self._do("to make a stream", "cudaStreamCreateWithFlags", self._r.cudaStreamNonBlocking)
        stack.callback(self._do, "to free a stream", "cudaStreamDestroy", stream)
        return stream

    def stream_number(self, stream: Any) -> int:
        return int(stream)

    def synchronise(self, stream: Any) -> None:
        self._do("while running", "cudaStreamSynchronize", stream)

    def event(self, stack: ExitStack) -> Any:
        event = self._do("to make an event", "cudaEventCreate")
        stack.callback(self._do, "to free an event", "cudaEventDestroy", event)
        return event

    def record(self, event: Any, stream: Any) -> None:
        self._do("to record an event", "cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._do("to read events", "cudaEventElapsedTime", start, end))

    def copy_in(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        kind, source = self._r.cudaMemcpyKind.cudaMemcpyHostToDevice, buffer.host.ctypes.data
        self._do("to copy to the device", "cudaMemcpyAsync", buffer.pointer, source, size, kind, stream)

    def copy_out(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        kind, target = self._r.cudaMemcpyKind.cudaMemcpyDeviceToHost, buffer.host.ctypes.data
        self._do("to copy from the device", "cudaMemcpyAsync", target, buffer.pointer, size, kind, stream)

    def capture(self, stream: Any, compute: Callable[[], None], stack: ExitStack) -> Callable[[], None]:
        # Other threads may allocate meanwhile: only this thread's calls are watched.
        mode = self._r.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("to begin a graph", "cudaStreamBeginCapture", stream, mode)
        try:
            compute()
        except BaseException:
            with contextlib.suppress(BackendError):
                self._r.cudaGraphDestroy(self._do("to end a graph", "cudaStreamEndCapture", stream))
            raise
        graph = self._do("to end a graph", "cudaStreamEndCapture", stream)
        try:
            executable = self._do("to make a graph", "cudaGraphInstantiate", graph, 0)
        finally:
            self._r.cudaGraphDestroy(graph)
        stack.callback(self._do, "to free a graph", "cudaGraphExecDestroy", executable)
        return lambda: self._do("to launch a graph", "cudaGraphLaunch", executable, stream)


def _bytes_at(pointer: int, size: int) -> Array:
    view: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return view
