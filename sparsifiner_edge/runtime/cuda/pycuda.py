"""Adapter for pycuda: `Driver`, with the functions of CUDA's runtime API done by pycuda's objects.

They live on the primary context, which TensorRT uses too, in one thread, and without CUDA graphs.
"""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Driver, bytes_at, fail, no_driver

_TO_DEVICE, _TO_HOST = 1, 2
_CONSTANTS = SimpleNamespace(
    cudaHostAllocMapped=2,
    cudaStreamNonBlocking=1,
    cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=_TO_DEVICE, cudaMemcpyDeviceToHost=_TO_HOST),
)


class PyCudaDriver(Driver):
    """`Driver` on pycuda, which frees what it made with its last reference: all is kept here, by handle.

    Raises:
        BackendError: see `open_driver`.
    """

    graphs = False

    def __init__(self) -> None:
        try:
            module, d = (importlib.import_module(name) for name in ("pycuda", "pycuda.driver"))
        except ImportError as error:  # Its extension is linked to libcuda.so.1.
            if "libcuda" in str(error):
                no_driver("pycuda", str(error))
            raise BackendError(f"pycuda cannot be imported: {error}.", "Reinstall pycuda.") from error
        self._d, self._thread = d, threading.get_ident()
        self._context: Any = None
        kept: dict[int, Any] = {}

        def keep(made: Any, handle: int) -> int:
            kept[handle] = made
            return handle

        def pin(size: int, _flags: int) -> int:
            view = d.pagelocked_empty(size, np.uint8, mem_flags=d.host_alloc_flags.DEVICEMAP)
            return keep(view, view.ctypes.data)

        def copy(target: int, source: int, size: int, kind: int, stream: int) -> None:
            if kind == _TO_DEVICE:
                d.memcpy_htod_async(target, bytes_at(source, size), kept[stream])
            else:
                d.memcpy_dtoh_async(bytes_at(target, size), source, kept[stream])

        self._functions = {
            "cudaDriverGetVersion": d.get_driver_version,
            "cudaGetDeviceCount": lambda: (d.init(), d.Device.count())[1],
            "cudaSetDevice": self._take,
            "cudaGetDeviceProperties": self._properties,
            "cudaMemGetInfo": d.mem_get_info,
            "cudaMalloc": lambda size: keep(made := d.mem_alloc(size), int(made)),
            "cudaFree": lambda pointer: kept.pop(pointer).free(),
            "cudaHostAlloc": pin,
            "cudaFreeHost": lambda pointer: kept.pop(pointer).base.free(),
            "cudaHostGetDevicePointer": lambda pointer, _: kept[pointer].base.get_device_pointer(),
            "cudaStreamCreateWithFlags": lambda flags: keep(made := d.Stream(flags), int(made.handle)),
            "cudaStreamSynchronize": lambda stream: kept[stream].synchronize(),
            "cudaStreamDestroy": kept.pop,
            "cudaEventCreate": lambda: keep(made := d.Event(), -id(made)),
            "cudaEventRecord": lambda event, stream: kept[event].record(kept[stream]),
            "cudaEventElapsedTime": lambda start, end: kept[start].time_till(kept[end]),
            "cudaEventDestroy": kept.pop,
            "cudaMemcpyAsync": copy,
        }
        super().__init__(_CONSTANTS, "pycuda", getattr(module, "VERSION_TEXT", ""))

    def call(self, action: str, function: str, *arguments: Any) -> Any:
        """See `Driver.call`."""
        return self._checked(action, self._functions[function], *arguments)

    def _checked(self, action: str, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._d.Error as error:
            # "cuMemAlloc failed: out of memory": the words after the colon name the error.
            fail(self.package, action, str(error).rpartition(": ")[2].strip(), str(error))

    def _take(self, device: int) -> None:
        """pycuda binds its context to one thread."""
        if threading.get_ident() != self._thread:
            raise BackendError(
                f"{self.package} works in the thread alone that opened it.",
                "Open the session in the thread that runs it, or install cuda-python.",
            )
        if self._context is None:
            self._context = self._d.Device(device).retain_primary_context()
            self._context.push()

    def _properties(self, device: int) -> Any:
        found, integrated = self._d.Device(device), self._d.device_attribute.INTEGRATED
        (major, minor), memory = found.compute_capability(), found.total_memory()
        about = {"name": found.name(), "major": major, "minor": minor, "totalGlobalMem": memory}
        return SimpleNamespace(**about, integrated=found.get_attribute(integrated))

    def close(self) -> None:
        """Let go of the context; closing twice is harmless."""
        if self._context is not None:
            context, self._context = self._context, None
            for step in (context.pop, context.detach):
                self._checked("to let go of the device", step)
