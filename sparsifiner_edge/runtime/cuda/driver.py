"""The protocol that both adapters fulfil, and the choice between them.

No object of TensorRT may exist before `open_driver` or `probe` has succeeded: without a driver TensorRT's own objects
come up all the same and end the process when they are used.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple, NoReturn, Protocol

from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.runtime.session import Array

ADAPTERS = {
    "cuda-python": "sparsifiner_edge.runtime.cuda.cuda_python",
    "pycuda": "sparsifiner_edge.runtime.cuda.pycuda",
}
"""Package -> module that has `open_device(index)`; the first one that is installed is used."""
_LOST = (
    "ILLEGALADDRESS", "LAUNCHFAIL", "LAUNCHTIMEOUT", "ECCUNCORRECTABLE", "HARDWARESTACK", "CONTEXTISDESTROYED",
    "ASSERT", "MISALIGNED", "INVALIDPC", "ILLEGALINSTRUCTION", "INVALIDUNKNOWNERRORCODE", "DEVICEUNAVAILABLE",
)  # fmt: skip
_NO_DRIVER = ("INSUFFICIENTDRIVER", "SYSTEMDRIVERMISMATCH", "STUBLIBRARY")
_NO_DEVICE = ("NODEVICE",)
_MEMORY = ("MEMORYALLOCATION", "OUTOFMEMORY")


class Device(NamedTuple):
    """A CUDA device as found.

    Attributes:
        number: CUDA's index of it.
        name: such as "NVIDIA L4" or "Orin".
        sm: compute capability, such as (8, 7).
        memory_bytes: its memory; on an integrated device that of the whole board.
        integrated: it shares the processor's memory, as on a Jetson.
        driver_version: the newest CUDA that the driver supports, such as "12.6".
    """

    number: int
    name: str
    sm: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver_version: str

    @property
    def compute_capability(self) -> str:
        """Such as "8.7"."""
        return f"{self.sm[0]}.{self.sm[1]}"


class HostMemory(NamedTuple):
    """Page-locked memory: the processor's view of it as bytes, and the address under which the device sees it."""

    bytes: Array
    device_pointer: int
    handle: Any


class Driver(Protocol):
    """What running an engine needs of CUDA, on one device.

    Streams, events and graphs are handles that only their adapter understands; `stream_number` gives the number that
    TensorRT wants. Every method raises BackendError with CUDA's name of the error.
    """

    @property
    def package(self) -> str:
        """Package and version, such as "cuda-python 13.4.4"."""

    @property
    def device(self) -> Device:
        """The device that everything lives on."""

    @property
    def graphs(self) -> bool:
        """This package can capture CUDA graphs."""

    def use(self) -> None:
        """Make the device the calling thread's own; call it before anything else there."""

    def free_bytes(self) -> int:
        """Device memory that is free now."""

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes; returns its address."""

    def free(self, pointer: int) -> None:
        """Give device memory back."""

    def allocate_host(self, size: int) -> HostMemory:
        """Page-locked memory of `size` bytes, mapped into the device's address space."""

    def free_host(self, memory: HostMemory) -> None:
        """Give page-locked memory back; its view must not be used afterwards."""

    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""

    def stream_number(self, stream: Any) -> int:
        """The stream's address."""

    def free_stream(self, stream: Any) -> None:
        """Give a stream back."""

    def synchronise(self, stream: Any) -> None:
        """Wait until everything in the stream is done."""

    def event(self) -> Any:
        """A new event that keeps the time."""

    def free_event(self, event: Any) -> None:
        """Give an event back."""

    def record(self, event: Any, stream: Any) -> None:
        """Put an event into a stream."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two recorded events whose stream has been waited for."""

    def copy_in(self, pointer: int, memory: HostMemory, size: int, stream: Any) -> None:
        """Copy the first `size` bytes of page-locked memory to the device."""

    def copy_out(self, memory: HostMemory, pointer: int, size: int, stream: Any) -> None:
        """Copy `size` bytes of the device to page-locked memory."""

    def begin_capture(self, stream: Any) -> None:
        """From here on record what is put into the stream instead of running it."""

    def end_capture(self, stream: Any) -> Any:
        """End recording; returns a graph ready to launch."""

    def launch(self, graph: Any, stream: Any) -> None:
        """Put a graph into a stream."""

    def free_graph(self, graph: Any) -> None:
        """Give a graph back."""

    def close(self) -> None:
        """Let go of the device."""


def open_driver(index: int = 0) -> Driver:
    """The driver of the first adapter whose package is installed, on device `index`.

    Raises:
        MissingExtraError: neither package is installed.
        BackendError: no driver, one too old, no device, or CUDA fails; says which.
    """
    for module in ADAPTERS.values():
        adapter = importlib.import_module(module)
        if adapter.installed():
            driver: Driver = adapter.open_device(index)
            return driver
    raise MissingExtraError(" or ".join(ADAPTERS), "gpu")


def probe(index: int = 0) -> Device:
    """The CUDA device `index`, after CUDA itself has answered.

    Raises:
        MissingExtraError, BackendError: see `open_driver`.
    """
    driver = open_driver(index)
    try:
        return driver.device
    finally:
        driver.close()


def version_text(number: int) -> str:
    """CUDA's 12060 -> "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


_FIXES = (
    (_NO_DRIVER, "Install or update NVIDIA's driver; `nvidia-smi` must work first."),
    (_NO_DEVICE, "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it."),
    (_MEMORY, "The device is out of memory: end other programs on it, or take a smaller batch or image."),
    (_LOST, "The device is lost to this process: start it again; if it happens again, build the engine again."),
)


def fail(package: str, action: str, name: str, meaning: str = "") -> NoReturn:
    """Raise the BackendError for an error of CUDA, by its name."""
    what = f"CUDA ({package}) failed {action}: {name}{f', {meaning}' if meaning else ''}."
    letters = re.sub(r"[^A-Z]", "", name.upper())  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE and "no device" alike.
    fix = next(
        (fix for words, fix in _FIXES if any(word in letters for word in words)),
        "Start again; if it stays, report it with the output of `sparsifiner-edge doctor`.",
    )
    raise BackendError(what, fix)


def no_driver(package: str, reason: str) -> NoReturn:
    """Raise the BackendError for a machine without NVIDIA's driver."""
    raise BackendError(
        f"No NVIDIA driver ({package}: {' '.join(reason.split())[:200]}).",
        "Install NVIDIA's driver (a Jetson's comes with JetPack); `sparsifiner-edge doctor` shows what is found.",
    )


def check_index(index: int, count: int) -> None:
    """Refuse a device that is not there."""
    if count < 1:
        raise BackendError(
            "CUDA finds no device.",
            "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
        )
    if not 0 <= index < count:
        raise BackendError(f"There is no CUDA device {index}.", f"Choose one from 0 to {count - 1}.")
