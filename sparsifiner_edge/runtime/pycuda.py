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

_TO_DEVICE, _TO_HOST = 1, 2
_NAMES = {
    "out of memory": "MemoryAllocation", "no device": "NoDevice", "no CUDA-capable device": "NoDevice",
    "launch failed": "LaunchFailure", "launch failure": "LaunchFailure", "illegal memory access": "IllegalAddress",
    "illegal instruction": "IllegalInstruction", "misaligned": "MisalignedAddress",
    "driver combination": "SystemDriverMismatch",
}  # fmt: skip
"""Of the runtime API, by words that pycuda has for them; other errors say what they are in its words."""


class _Failure(int):
    """A status that is not 0. name: as the runtime API has it. text: pycuda's own words."""

    name, text = "", ""

    @classmethod
    def of(cls, text: str) -> _Failure:
        made = cls(1)
        made.name = "cudaError" + next((name for words, name in _NAMES.items() if words in text), "")
        made.text = text
        return made


class PyCuda:
    """In the place of `cuda.bindings.runtime`: functions give a status and what they made; what pycuda would free with
    its last reference is kept here, by handle.

    Args:
        driver: the module `pycuda.driver`.
    """

    cudaHostAllocMapped, cudaStreamNonBlocking = 2, 1  # noqa: N815 - CUDA's names
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=_TO_DEVICE, cudaMemcpyDeviceToHost=_TO_HOST
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, driver: Any) -> None:
        self._d, self._kept, self._thread = driver, dict[int, Any](), 0
        d, kept = driver, self._kept

        def pin(size: int, _flags: int) -> int:
            array = d.pagelocked_empty(size, np.uint8, mem_flags=d.host_alloc_flags.DEVICEMAP)
            return self._keep(array, array.ctypes.data)

        def copy(target: int, source: int, size: int, kind: int, stream: int) -> None:
            if kind == _TO_DEVICE:
                d.memcpy_htod_async(target, bytes_at(source, size), kept[stream])
            else:
                d.memcpy_dtoh_async(bytes_at(target, size), source, kept[stream])

        self._functions: dict[str, Callable[..., Any]] = {
            "cudaDriverGetVersion": d.get_driver_version,
            "cudaGetDeviceCount": lambda: (d.init(), d.Device.count())[1],
            "cudaSetDevice": self._take,
            "cudaGetDeviceProperties": self._properties,
            "cudaMemGetInfo": d.mem_get_info,
            "cudaMalloc": lambda size: self._keep(made := d.mem_alloc(size), int(made)),
            "cudaFree": lambda pointer: kept.pop(pointer).free(),
            "cudaHostAlloc": pin,
            "cudaFreeHost": lambda pointer: kept.pop(pointer).base.free(),
            "cudaHostGetDevicePointer": lambda pointer, _: int(kept[pointer].base.get_device_pointer()),
            "cudaStreamCreateWithFlags": lambda flags: self._keep(made := d.Stream(flags), int(made.handle)),
            "cudaStreamSynchronize": lambda stream: kept[stream].synchronize(),
            "cudaStreamDestroy": lambda stream: (kept.pop(stream), None)[1],
            "cudaEventCreate": lambda: self._keep(made := d.Event(), id(made)),
            "cudaEventRecord": lambda event, stream: (kept[event].record(kept[stream]), None)[1],
            "cudaEventElapsedTime": lambda start, end: kept[start].time_till(kept[end]),
            "cudaEventDestroy": lambda event: (kept.pop(event), None)[1],
            "cudaMemcpyAsync": copy,
        }

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """A function of the runtime API."""

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name not in self._functions:
                return (_Failure.of(f"pycuda has no {name}"),)
            try:
                made = self._functions[name](*arguments)
            except self._d.Error as error:
                return (_Failure.of(str(error)),)
            return (0, *(made if isinstance(made, tuple) else () if made is None else (made,)))

        return call

    @staticmethod
    def cudaGetErrorString(status: _Failure) -> tuple[int, bytes]:  # noqa: N802 - CUDA's name
        """pycuda's words."""
        return 0, status.text.encode()

    def _keep(self, made: Any, handle: int) -> int:
        self._kept[handle] = made
        return handle

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
        found, attribute = self._d.Device(device), self._d.device_attribute.INTEGRATED
        (major, minor), memory = found.compute_capability(), found.total_memory()
        about = {"name": found.name(), "major": major, "minor": minor, "totalGlobalMem": memory}
        return SimpleNamespace(**about, integrated=found.get_attribute(attribute))
