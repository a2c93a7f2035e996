"""The protocol that both adapters fulfil, and the choice between them.

No object of TensorRT may exist before `open_driver` or `probe` has succeeded: without a driver TensorRT's own objects
come up all the same and end the process when they are used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, NoReturn, Protocol

import msgspec

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.machine import jetson_release

ADAPTERS = {
    "cuda-python": "sparsifiner_edge.runtime.cuda.cuda_python",
    "pycuda": "sparsifiner_edge.runtime.cuda.pycuda",
}
"""Package -> module that has `MODULE` and `open_device()`; the first one that is installed is used."""


OLDEST_CUDA = "12.6"
"""The oldest release of cuda-python, and of CUDA on a Jetson, that is supported."""


class CudaDevice(msgspec.Struct, frozen=True):
    """CUDA's first device; `CUDA_VISIBLE_DEVICES` says which one that is.

    Attributes:
        number: CUDA's index of it.
        name: such as "NVIDIA L4" or "Orin".
        sm: compute capability, such as (8, 7).
        memory_bytes: its memory; on an integrated device that of the whole board.
        integrated: it shares the processor's memory, as on a Jetson.
        driver_version: the newest CUDA that the driver supports, such as "12.6".
        compute_capability: `sm` as text, such as "8.7".
    """

    number: int
    name: str
    sm: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver_version: str
    compute_capability: str = ""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "compute_capability", f"{self.sm[0]}.{self.sm[1]}")


class PinnedBuffer(NamedTuple):
    """Page-locked bytes of the processor, and a device address: of these bytes, or of what they are copied to."""

    host: Array
    pointer: int


class Driver(Protocol):
    """What running an engine needs of CUDA, on one device.

    Streams and events are handles that only their adapter understands. What a method takes is given back when `stack`
    closes. Every method raises BackendError with CUDA's name of the error.

    Attributes:
        package: package and version, such as "cuda-python 13.4.4".
        device: the device that everything lives on.
        graphs: this package can capture CUDA graphs.
    """

    package: str
    device: CudaDevice
    graphs: bool = False

    def use(self) -> None:
        """Make the device the calling thread's own; call it before anything else there."""

    def free_bytes(self) -> int:
        """Device memory that is free now."""

    def allocate(self, size: int, stack: ExitStack) -> int:
        """Device memory of `size` bytes; returns its address."""

    def allocate_host(self, size: int, stack: ExitStack) -> PinnedBuffer:
        """Page-locked memory of `size` bytes, mapped into the device's address space."""

    def allocate_managed(self, size: int, stack: ExitStack) -> PinnedBuffer:  # noqa: ARG002
        """`size` bytes for processor and device, which the driver keeps coherent; for one of both at a time."""
        raise BackendError(f"{self.package} is not used for managed memory.", "Install cuda-python for it.")

    def stream(self, stack: ExitStack) -> Any:
        """A new stream that does not wait for the default one."""

    def stream_number(self, stream: Any) -> int:
        """The stream's address, which TensorRT takes."""

    def synchronise(self, stream: Any) -> None:
        """Wait until everything in the stream is done."""

    def event(self, stack: ExitStack) -> Any:
        """A new event that keeps the time."""

    def record(self, event: Any, stream: Any) -> None:
        """Put an event into a stream."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two recorded events whose stream has been waited for."""

    def copy_in(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        """Copy the first `size` bytes of page-locked memory to the device."""

    def copy_out(self, buffer: PinnedBuffer, size: int, stream: Any) -> None:
        """Copy `size` bytes of the device to page-locked memory."""

    def capture(self, stream: Any, compute: Callable[[], None], stack: ExitStack) -> Callable[[], None]:  # noqa: ARG002
        """Record what `compute` puts into the stream; returns what launches the recording, a CUDA graph, there."""
        raise BackendError(f"{self.package} has no CUDA graphs.", "Install cuda-python for them.")

    def close(self) -> None:
        """Let go of the device; the runtime API's context stays with the process."""
        return


def open_driver() -> Driver:
    """The driver of the first adapter whose package is installed.

    Raises:
        MissingExtraError: neither package is installed.
        BackendError: no driver, one too old, no device, or CUDA fails; says which.
    """
    for name in ADAPTERS.values():
        adapter = importlib.import_module(name)
        if installed(adapter.MODULE):
            driver: Driver = adapter.open_device()
            return driver
    raise MissingExtraError(" or ".join(ADAPTERS), "gpu" if jetson_release() is None else "jetson")


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def probe() -> CudaDevice:
    """The CUDA device, after CUDA itself has answered.

    Raises:
        MissingExtraError, BackendError: see `open_driver`.
    """
    with contextlib.closing(open_driver()) as driver:
        return driver.device


def version_text(number: int) -> str:
    """CUDA's 12060 -> "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def major(version: str) -> int:
    """The first number of a version, such as 12 of "12.9.10"; 0 where there is none."""
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def too_new(version: str, driver: str) -> tuple[str, str] | None:
    """What is wrong with a release of cuda-python for a driver, and what to do; None where it fits.

    A package works with drivers of its own major version of CUDA and newer ones; with an older one CUDA says no more
    than cudaErrorInsufficientDriver.

    Args:
        version: of cuda-python. driver: the newest CUDA that the driver supports.
    """
    if major(version) <= major(driver):
        return None
    what = f"cuda-python {version} needs a driver for CUDA {major(version)}, and this one takes CUDA {driver} at most."
    if major(driver) < major(OLDEST_CUDA):
        return what, f"Update the driver (on a Jetson: JetPack): CUDA {OLDEST_CUDA} is the oldest that is supported."
    return what, f'pip install "cuda-python>={OLDEST_CUDA},<{major(driver) + 1}"'


_FIXES = {
    "INSUFFICIENTDRIVER":
        "The driver is older than cuda-python: `sparsifiner-edge doctor` says what fits. "
        f'Or install or update NVIDIA\'s driver; for CUDA 12: pip install "cuda-python>={OLDEST_CUDA},<13".',
    r"SYSTEMDRIVERMISMATCH|STUBLIBRARY": "Install or update NVIDIA's driver (a Jetson's comes with JetPack).",
    r"NODEVICE": "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
    r"MEMORYALLOCATION|OUTOFMEMORY":
        "The device is out of memory: end other programs on it, or take a smaller batch or image.",
    r"ILLEGALADDRESS|LAUNCHFAIL|LAUNCHTIMEOUT|ECCUNCORRECTABLE|HARDWARESTACK|CONTEXTISDESTROYED|ASSERT|MISALIGNED|"
    r"INVALIDPC|ILLEGALINSTRUCTION|INVALIDUNKNOWNERRORCODE|DEVICEUNAVAILABLE":
        "The device is lost to this process: start it again; if it happens again, build the engine again.",
    "": "Start again; if it stays, report it with the output of `sparsifiner-edge doctor`.",
}  # fmt: skip
"""What to do, by a part of the error's name in capitals; the first that is found counts."""


def fail(package: str, action: str, name: str, meaning: str = "") -> NoReturn:
    """Raise the BackendError for an error of CUDA, by its name."""
    what = f"CUDA ({package}) failed {action}: {name}{f', {meaning}' if meaning else ''}."
    letters = re.sub(r"[^A-Z]", "", name.upper())  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE and "no device" alike.
    raise BackendError(what, next(fix for part, fix in _FIXES.items() if re.search(part, letters)))


def no_driver(package: str, reason: str) -> NoReturn:
    """Raise the BackendError for a machine without NVIDIA's driver."""
    raise BackendError(
        f"No NVIDIA driver ({package}: {' '.join(reason.split())[:200]}).",
        "Install NVIDIA's driver (a Jetson's comes with JetPack); `sparsifiner-edge doctor` shows what is found.",
    )


def check_device(count: int) -> None:
    """Refuse a machine whose driver counts no device."""
    if count < 1:
        raise BackendError("CUDA finds no device.", _FIXES["NODEVICE"])
