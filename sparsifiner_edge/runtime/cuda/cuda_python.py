"""Adapter for NVIDIA's cuda-python (cuda.bindings 12.6 and later): the runtime API, on the primary context."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Device, Driver, HostMemory, check_index, fail, no_driver, version_text

MODULE = "cuda.bindings"


def open_device(index: int) -> Driver:
    """See `open_driver`."""
    try:
        bindings, runtime = (importlib.import_module(f"cuda.bindings{name}") for name in ("", ".runtime"))
    except Exception as error:  # Its loader has errors of its own.
        raise BackendError(f"cuda-python cannot be imported: {error}.", "Reinstall cuda-python.") from error
    package = f"cuda-python {getattr(bindings, '__version__', '')}".strip()
    return _CudaPython(runtime, package, index)


class _CudaPython(Driver):
    """On the module `runtime`; `package`: name and version for messages."""

    graphs = True

    def __init__(self, runtime: Any, package: str, index: int) -> None:
        self._r = runtime
        self.package = package
        check_index(index, self._device_count())
        self._index = index
        self.use()
        self.device = self._describe(index)

    def _device_count(self) -> int:
        try:
            version = self._do("to read the driver's version", "cudaDriverGetVersion")
            if version == 0:  # How the runtime says that there is no driver.
                no_driver(self.package, "CUDA gives 0 as its version")
            return int(self._do("to count devices", "cudaGetDeviceCount"))
        except RuntimeError as error:  # Up to 12.8 and from its path finder on: libcuda.so cannot be loaded.
            no_driver(self.package, str(error))

    def _describe(self, index: int) -> Device:
        properties = self._do("to describe the device", "cudaGetDeviceProperties", index)
        name = properties.name.decode("utf-8", "replace") if isinstance(properties.name, bytes) else properties.name
        return Device(
            index,
            str(name).strip("\0 "),
            (int(properties.major), int(properties.minor)),
            int(properties.totalGlobalMem),
            bool(properties.integrated),
            version_text(int(self._do("to read the driver's version", "cudaDriverGetVersion"))),
        )

    def _do(self, action: str, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA; returns what it gives beside its status."""
        status, *values = getattr(self._r, function)(*arguments)
        if int(status) != 0:
            fail(self.package, action, str(getattr(status, "name", status)), self._meaning(status))
        return values[0] if len(values) == 1 else tuple(values)

    def _meaning(self, status: Any) -> str:
        found, text = self._r.cudaGetErrorString(status)
        return text.decode() if int(found) == 0 and isinstance(text, bytes) else ""

    def use(self) -> None:
        self._do("to take the device", "cudaSetDevice", self._index)

    def free_bytes(self) -> int:
        return int(self._do("to read free memory", "cudaMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        return int(self._do(f"to allocate {size} bytes", "cudaMalloc", size))

    def free(self, pointer: int) -> None:
        self._do("to free memory", "cudaFree", pointer)

    def allocate_host(self, size: int) -> HostMemory:
        pointer = int(self._do(f"to pin {size} bytes", "cudaHostAlloc", size, self._r.cudaHostAllocMapped))
        try:
            mapped = int(self._do("to map pinned memory", "cudaHostGetDevicePointer", pointer, 0))
        except BackendError:
            self._r.cudaFreeHost(pointer)
            raise
        view: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        return HostMemory(view, mapped, pointer)

    def free_host(self, memory: HostMemory) -> None:
        self._do("to free pinned memory", "cudaFreeHost", memory.handle)

    def stream(self) -> Any:
        return self._do("to make a stream", "cudaStreamCreateWithFlags", self._r.cudaStreamNonBlocking)

    def stream_number(self, stream: Any) -> int:
        return int(stream)

    def free_stream(self, stream: Any) -> None:
        self._do("to free a stream", "cudaStreamDestroy", stream)

    def synchronise(self, stream: Any) -> None:
        self._do("while running", "cudaStreamSynchronize", stream)

    def event(self) -> Any:
        return self._do("to make an event", "cudaEventCreate")

    def free_event(self, event: Any) -> None:
        self._do("to free an event", "cudaEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._do("to record an event", "cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._do("to read events", "cudaEventElapsedTime", start, end))

    def copy_in(self, pointer: int, memory: HostMemory, size: int, stream: Any) -> None:
        kind = self._r.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("to copy to the device", "cudaMemcpyAsync", pointer, memory.handle, size, kind, stream)

    def copy_out(self, memory: HostMemory, pointer: int, size: int, stream: Any) -> None:
        kind = self._r.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("to copy from the device", "cudaMemcpyAsync", memory.handle, pointer, size, kind, stream)

    def begin_capture(self, stream: Any) -> None:
        # Other threads may allocate meanwhile: only this thread's calls are watched.
        mode = self._r.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("to begin a graph", "cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        graph = self._do("to end a graph", "cudaStreamEndCapture", stream)
        try:
            return self._do("to make a graph", "cudaGraphInstantiate", graph, 0)
        finally:
            self._r.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: Any) -> None:
        self._do("to launch a graph", "cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._do("to free a graph", "cudaGraphExecDestroy", graph)
