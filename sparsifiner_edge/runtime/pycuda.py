"""CUDA runtime API on top of pycuda, limited to the functions that `cuda.Driver` calls.

All objects live on the primary context, which TensorRT uses too, and in one thread. pycuda does not support CUDA
graphs, so every run is launched directly.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import bytes_at

_NAMES = {
    "out of memory": "MemoryAllocation",
    "no device": "NoDevice",
    "no CUDA-capable device": "NoDevice",
    "launch failed": "LaunchFailure",
    "launch failure": "LaunchFailure",
    "illegal memory access": "IllegalAddress",
    "illegal instruction": "IllegalInstruction",
    "misaligned": "MisalignedAddress",
    "driver combination": "SystemDriverMismatch",
}
"""Words in an error message of pycuda -> the runtime API's name of that error, without "cudaError".

Other errors have no name and are reported by their message alone.
"""


class _Failure(int):
    """Nonzero status of a failed call.

    Attributes:
        name: Name of the error in the runtime API; "cudaError" alone if it is not in `_NAMES`.
        text: Error message of pycuda.
    """

    name: str
    text: str

    def __new__(cls, text: str) -> _Failure:
        status = super().__new__(cls, 1)
        status.name = "cudaError" + next((name for words, name in _NAMES.items() if words in text), "")
        status.text = text
        return status


class PyCuda:
    """Replacement for the module `cuda.bindings.runtime` that calls pycuda.

    As in that module, each function returns a tuple of its status and its results. pycuda frees a resource with the
    last reference to its object, so the objects are kept here, by handle, until they are freed.

    Args:
        driver: Module `pycuda.driver`.
    """

    cudaHostAllocMapped, cudaStreamNonBlocking = 2, 1  # noqa: N815 - CUDA's names
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, driver: Any) -> None:
        d, objects = driver, dict[int, Any]()
        self._d, self._thread = d, 0

        def keep(resource: Any, handle: int) -> int:
            objects[handle] = resource
            return handle

        def pin(size: int, _flags: int) -> int:
            array = d.pagelocked_empty(size, np.uint8, mem_flags=d.host_alloc_flags.DEVICEMAP)
            return keep(array, array.ctypes.data)

        def copy(target: int, source: int, size: int, kind: int, stream: int) -> None:
            if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
                d.memcpy_htod_async(target, bytes_at(source, size), objects[stream])
            else:
                d.memcpy_dtoh_async(bytes_at(target, size), source, objects[stream])

        self._functions: dict[str, Callable[..., Any]] = {
            "cudaDriverGetVersion": d.get_driver_version,
            "cudaGetDeviceCount": lambda: (d.init(), d.Device.count())[1],
            "cudaSetDevice": self._take,
            "cudaGetDeviceProperties": self._properties,
            "cudaMemGetInfo": d.mem_get_info,
            "cudaMalloc": lambda size: keep(memory := d.mem_alloc(size), int(memory)),
            "cudaFree": lambda pointer: objects.pop(pointer).free(),
            "cudaHostAlloc": pin,
            "cudaFreeHost": lambda pointer: objects.pop(pointer).base.free(),
            "cudaHostGetDevicePointer": lambda pointer, _: int(objects[pointer].base.get_device_pointer()),
            "cudaStreamCreateWithFlags": lambda flags: keep(stream := d.Stream(flags), int(stream.handle)),
            "cudaStreamSynchronize": lambda stream: objects[stream].synchronize(),
            "cudaStreamDestroy": objects.pop,
            "cudaEventCreate": lambda: keep(event := d.Event(), id(event)),
            "cudaEventRecord": lambda event, stream: objects[event].record(objects[stream]),
            "cudaEventElapsedTime": lambda start, end: objects[start].time_till(objects[end]),
            "cudaEventDestroy": objects.pop,
            "cudaMemcpyAsync": copy,
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """Return the function of the runtime API with this name."""

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name not in self._functions:
                return (_Failure(f"pycuda has no {name}"),)
            try:
                results = self._functions[name](*arguments)
            except self._d.Error as error:
                return (_Failure(str(error)),)
            return 0, *(results if isinstance(results, tuple) else (results,))

        return call

    @staticmethod
    def cudaGetErrorString(status: _Failure) -> tuple[int, bytes]:  # noqa: N802 - CUDA's name
        """Return the error message of pycuda for a status."""
        return 0, status.text.encode()

    def _take(self, device: int) -> None:
        """Make the primary context of a device current in the first thread that calls this, until the process ends.

        Raises:
            pycuda.driver.Error: Another thread has called this before.
        """
        if not self._thread:
            context = self._d.Device(device).retain_primary_context()
            context.push()
            atexit.register(context.pop)
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise self._d.Error(
                "pycuda works only in the thread that used it first: call CUDA from that thread, or install cuda-python"
            )

    def _properties(self, device: int) -> Any:
        """Return name, compute capability and memory type of a device, as `cudaGetDeviceProperties` does."""
        gpu = self._d.Device(device)
        major, minor = gpu.compute_capability()
        integrated = gpu.get_attribute(self._d.device_attribute.INTEGRATED)
        return SimpleNamespace(name=gpu.name(), major=major, minor=minor, integrated=integrated)
