"""CUDA's runtime API, as far as `Driver` calls it, by pycuda's objects.

They live on the primary context, which TensorRT uses too, in one thread. pycuda has no CUDA graphs: runs are launched
plainly.
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
"""Of the runtime API, by words that pycuda has for them; other errors say what they are in its words."""


class _Failure(int):
    """A status that is not 0. name: as the runtime API has it. text: pycuda's own words."""

    name: str
    text: str

    def __new__(cls, text: str) -> _Failure:
        status = super().__new__(cls, 1)
        status.name = "cudaError" + next((name for words, name in _NAMES.items() if words in text), "")
        status.text = text
        return status


class PyCuda:
    """In the place of `cuda.bindings.runtime`: functions give a status and what they made; what pycuda would free with
    its last reference is kept here, by handle.

    Args:
        driver: the module `pycuda.driver`.
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
        """A function of the runtime API."""

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
        """pycuda's words."""
        return 0, status.text.encode()

    def _take(self, device: int) -> None:
        """The context of a device, made current in the thread that asks first until the process ends."""
        if not self._thread:
            context = self._d.Device(device).retain_primary_context()
            context.push()
            atexit.register(context.pop)
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise self._d.Error(
                "pycuda works in the thread alone that opened it, of a process: use CUDA there, or install cuda-python"
            )

    def _properties(self, device: int) -> Any:
        gpu = self._d.Device(device)
        major, minor = gpu.compute_capability()
        integrated = gpu.get_attribute(self._d.device_attribute.INTEGRATED)
        return SimpleNamespace(name=gpu.name(), major=major, minor=minor, integrated=integrated)
