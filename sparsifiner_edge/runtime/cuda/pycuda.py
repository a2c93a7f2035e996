"""Adapter for pycuda: the driver API on the primary context, which TensorRT uses too. It has no CUDA graphs."""

from __future__ import annotations

import importlib
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import (
    CudaDevice,
    Driver,
    PinnedBuffer,
    check_device,
    fail,
    no_driver,
    version_text,
)

MODULE = "pycuda"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


def open_device() -> Driver:
    """See `open_driver`."""
    try:
        module, driver = (importlib.import_module(name) for name in ("pycuda", "pycuda.driver"))
    except ImportError as error:  # Its extension is linked to libcuda.so.1.
        if "libcuda" in str(error):
            no_driver("pycuda", str(error))
        raise BackendError(f"pycuda cannot be imported: {error}.", "Reinstall pycuda.") from error
    return _PyCuda(driver, f"pycuda {getattr(module, 'VERSION_TEXT', '')}".strip())


class _PyCuda(Driver):
    """On the module `driver`; `package`: name and version for messages."""

    def __init__(self, driver: Any, package: str) -> None:
        self._d = driver
        self.package = package
        self._context: Any = None
        self._do("to start", driver.init)
        check_device(int(self._do("to count devices", driver.Device.count)))
        found = self._do("to take the device", driver.Device, 0)
        sm, memory = tuple(found.compute_capability()), int(found.total_memory())
        integrated = bool(found.get_attribute(driver.device_attribute.INTEGRATED))
        version = version_text(int(driver.get_driver_version()))
        self.device = CudaDevice(0, str(found.name()), sm, memory, integrated, version)
        self._context = self._do("to take the device", found.retain_primary_context)
        self._do("to take the device", self._context.push)
        self._thread = threading.get_ident()

    def _do(self, action: str, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except self._d.Error as error:
            # "cuMemAlloc failed: out of memory": the words after the colon name the error.
            fail(self.package, action, str(error).rpartition(": ")[2].strip(), str(error))

    def use(self) -> None:  # pycuda binds its context to one thread.
        if threading.get_ident() != self._thread:
            raise BackendError(
                f"{self.package} works in the thread alone that opened it.",
                "Open the session in the thread that runs it, or install cuda-python.",
            )

    def free_bytes(self) -> int:
        return int(self._do("to read free memory", self._d.mem_get_info)[0])

    def allocate(self, size: int, stack: ExitStack) -> int:
        allocation = self._do(f"to allocate {size} bytes", self._d.mem_alloc, size)
        stack.callback(self._do, "to free memory", allocation.free)
        return int(allocation)

    def allocate_host(self, size: int, stack: ExitStack) -> PinnedBuffer:
        flags = self._d.host_alloc_flags.DEVICEMAP
        view = self._do(f"to pin {size} bytes", self._d.pagelocked_empty, size, np.uint8, mem_flags=flags)
        stack.callback(self._do, "to free pinned memory", view.base.free)
        return PinnedBuffer(view, int(self._do("to map pinned memory", view.base.get_device_pointer)))

    def stream(self, stack: ExitStack) -> Any:  # noqa: ARG002 - pycuda frees streams and events with their last reference.
        return self._do("to make a stream", self._d.Stream, _NON_BLOCKING)

    def stream_number(self, stream: Any) -> int:
        return int(stream.handle)

    def synchronise(self, stream: Any) -> None:
        self._do("while running", stream.synchronize)

    def event(self, stack: ExitStack) -> Any:  # noqa: ARG002
        return self._do("to make an event", self._d.Event)

    def record(self, event: Any, stream: Any) -> None:
        self._do("to record an event", event.record, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._do("to read events", start.time_till, end))

    def copy_in(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        self._do("to copy to the device", self._d.memcpy_htod_async, buffer.pointer, buffer.host[:size], stream)

    def copy_out(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        self._do("to copy from the device", self._d.memcpy_dtoh_async, buffer.host[:size], buffer.pointer, stream)

    def close(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            self._do("to let go of the device", context.pop)
            self._do("to let go of the device", context.detach)
