"""Adapter for pycuda: the driver API on the primary context, which TensorRT uses too. It has no CUDA graphs."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from typing import Any, NoReturn

import numpy as np

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Device, Driver, HostMemory, check_index, fail, no_driver, version_text

MODULE = "pycuda"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


def open_device(index: int) -> Driver:
    """See `open_driver`."""
    try:
        version = importlib.metadata.version("pycuda")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    package = f"pycuda {version}".strip()
    try:
        driver = importlib.import_module("pycuda.driver")
    except ImportError as error:  # Its extension is linked to libcuda.so.1.
        if "libcuda" in str(error):
            no_driver(package, str(error))
        raise BackendError(f"pycuda cannot be imported: {error}.", "Reinstall pycuda.") from error
    return _PyCuda(driver, package, index)


class _PyCuda(Driver):
    """On the module `driver`; `package`: name and version for messages."""

    def __init__(self, driver: Any, package: str, index: int) -> None:
        self._d = driver
        self.package = package
        self._context: Any = None
        self._allocations: dict[int, Any] = {}
        self._do("to start", driver.init)
        check_index(index, int(self._do("to count devices", driver.Device.count)))
        found = self._do("to take the device", driver.Device, index)
        self.device = self._describe(index, found)
        self._context = self._do("to take the device", found.retain_primary_context)
        self._do("to take the device", self._context.push)
        self._thread = threading.get_ident()

    def _describe(self, index: int, found: Any) -> Device:
        return Device(
            index,
            str(found.name()),
            tuple(found.compute_capability()),
            int(found.total_memory()),
            bool(found.get_attribute(self._d.device_attribute.INTEGRATED)),
            version_text(int(self._d.get_driver_version())),
        )

    def _do(self, action: str, function: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except self._d.Error as error:
            self._fail(action, error)

    def _fail(self, action: str, error: Exception) -> NoReturn:
        """pycuda says "cuMemAlloc failed: out of memory": the words after the colon name the error."""
        fail(self.package, action, str(error).rpartition(": ")[2].strip(), str(error))

    def use(self) -> None:  # pycuda binds its context to one thread.
        if threading.get_ident() != self._thread:
            raise BackendError(
                f"{self.package} works in the thread alone that opened it.",
                "Open the session in the thread that runs it, or install cuda-python.",
            )

    def free_bytes(self) -> int:
        return int(self._do("to read free memory", self._d.mem_get_info)[0])

    def allocate(self, size: int) -> int:
        allocation = self._do(f"to allocate {size} bytes", self._d.mem_alloc, size)
        # Dropping the object would free the memory, so it is kept under its address.
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: int) -> None:
        self._do("to free memory", self._allocations.pop(pointer).free)

    def allocate_host(self, size: int) -> HostMemory:
        flags = self._d.host_alloc_flags.DEVICEMAP
        view = self._do(f"to pin {size} bytes", self._d.pagelocked_empty, size, np.uint8, mem_flags=flags)
        return HostMemory(view, int(self._do("to map pinned memory", view.base.get_device_pointer)), view.base)

    def free_host(self, memory: HostMemory) -> None:
        self._do("to free pinned memory", memory.handle.free)

    def stream(self) -> Any:
        return self._do("to make a stream", self._d.Stream, _NON_BLOCKING)

    def stream_number(self, stream: Any) -> int:
        return int(stream.handle)

    def free_stream(self, stream: Any) -> None:
        pass  # pycuda frees streams and events with their last reference, which the caller lets go of.

    def free_event(self, event: Any) -> None:
        pass

    def synchronise(self, stream: Any) -> None:
        self._do("while running", stream.synchronize)

    def event(self) -> Any:
        return self._do("to make an event", self._d.Event)

    def record(self, event: Any, stream: Any) -> None:
        self._do("to record an event", event.record, stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._do("to read events", start.time_till, end))

    def copy_in(self, pointer: int, memory: HostMemory, size: int, stream: Any) -> None:
        self._do("to copy to the device", self._d.memcpy_htod_async, pointer, memory.bytes[:size], stream)

    def copy_out(self, memory: HostMemory, pointer: int, size: int, stream: Any) -> None:
        self._do("to copy from the device", self._d.memcpy_dtoh_async, memory.bytes[:size], pointer, stream)

    def close(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            self._do("to let go of the device", context.pop)
            self._do("to let go of the device", context.detach)
