"""CUDA's runtime API on the first device: by cuda-python, or where that is not installed by pycuda (`pycuda.py`).

No object of TensorRT may exist before `open_driver` or `probe` has succeeded: without a driver TensorRT's own objects
come up all the same and end the process when they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.machine import jetson_release

OLDEST_CUDA = "12.6"
"""The oldest release of cuda-python, and of CUDA on a Jetson, that is supported."""


class CudaDevice(msgspec.Struct, frozen=True):
    """CUDA's first device; `CUDA_VISIBLE_DEVICES` says which one that is.

    Attributes:
        name: such as "NVIDIA L4" or "Orin". sm, compute_capability: such as (8, 7), and the same as text, "8.7".
        memory_bytes: its memory; on an integrated device that of the whole board.
        integrated: it shares the processor's memory, as on a Jetson.
        driver_version: the newest CUDA that the driver supports, such as "12.6".
    """

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


class Driver:
    """What running an engine needs of CUDA, on one device.

    Every method raises BackendError with CUDA's name of the error.

    Args:
        package: its name, such as "cuda-python". release: its version.

    Attributes:
        runtime: CUDA's functions and constants: the module `cuda.bindings.runtime`, or what stands for it.
        package: package and version, such as "cuda-python 13.4.4". device: the device that everything lives on.
        graphs: this package can capture CUDA graphs.
    """

    graphs = True

    def __init__(self, runtime: Any, package: str, release: str) -> None:
        self.runtime = runtime
        self.package = f"{package} {release}".strip()
        try:
            version = int(self.call("to read the driver's version", "cudaDriverGetVersion"))
        except RuntimeError as error:  # cuda-python up to 12.8 and from its path finder on: no libcuda.so.
            no_driver(self.package, str(error))
        if version == 0:  # How the runtime says that there is no driver.
            no_driver(self.package, "CUDA gives 0 as its version")
        if package == "cuda-python" and (unfit := too_new(release, version_text(version))):
            raise BackendError(*unfit)
        if int(self.call("to count devices", "cudaGetDeviceCount")) < 1:
            raise BackendError("CUDA finds no device.", _FIXES["NODEVICE"])
        self.use()
        found = self.call("to describe the device", "cudaGetDeviceProperties", 0)
        name = found.name.decode("utf-8", "replace") if isinstance(found.name, bytes) else found.name
        sm, memory = (int(found.major), int(found.minor)), int(found.totalGlobalMem)
        self.device = CudaDevice(str(name).strip("\0 "), sm, memory, bool(found.integrated), version_text(version))

    def call(self, action: str, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA; returns what it gives beside its status. `action`: such as "to free memory"."""
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status) != 0:
            meaning = self.runtime.cudaGetErrorString(status)[1]
            name = str(getattr(status, "name", status))
            fail(self.package, action, name, meaning.decode() if isinstance(meaning, bytes) else "")
        return values[0] if len(values) == 1 else tuple(values)

    def take(self, stack: ExitStack, what: str, function: str, *arguments: Any, free: str) -> int:
        """Address or handle of `what`, such as "an event", which the function `free` gives back when `stack` closes."""
        handle = int(self.call(f"to make {what}", function, *arguments))
        stack.callback(self.call, f"to free {what}", free, handle)
        return handle

    def use(self) -> None:
        """Make the device the calling thread's own; call it before anything else there."""
        self.call("to take the device", "cudaSetDevice", 0)

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        return int(self.call("to read free memory", "cudaMemGetInfo")[0])

    def pinned(self, size: int, stack: ExitStack) -> PinnedBuffer:
        """Page-locked memory of `size` bytes, which is an integrated device's too; for another as much of its own."""
        flags = self.runtime.cudaHostAllocMapped
        host = self.take(stack, f"{size} pinned bytes", "cudaHostAlloc", size, flags, free="cudaFreeHost")
        if self.device.integrated:
            return PinnedBuffer(bytes_at(host, size), int(self.call("to map", "cudaHostGetDevicePointer", host, 0)))
        device = self.take(stack, f"{size} bytes of the device", "cudaMalloc", size, free="cudaFree")
        return PinnedBuffer(bytes_at(host, size), device)

    def capture(self, stream: int, compute: Callable[[], None], stack: ExitStack) -> Callable[[], None]:
        """Record what `compute` puts into the stream; returns what launches the recording, a CUDA graph, there."""
        # Other threads may allocate meanwhile: only this thread's calls are watched.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("to begin a graph", "cudaStreamBeginCapture", stream, mode)
        try:
            compute()
        except BaseException:
            with contextlib.suppress(BackendError):
                self.runtime.cudaGraphDestroy(self.call("to end a graph", "cudaStreamEndCapture", stream))
            raise
        graph = self.call("to end a graph", "cudaStreamEndCapture", stream)
        try:
            executable = self.call("to make a graph", "cudaGraphInstantiate", graph, 0)
        finally:
            self.runtime.cudaGraphDestroy(graph)
        stack.callback(self.call, "to free a graph", "cudaGraphExecDestroy", executable)
        return lambda: self.call("to launch a graph", "cudaGraphLaunch", executable, stream)

    def close(self) -> None:
        """Let go of the device; the runtime API's context stays with the process."""


def bytes_at(pointer: int, size: int) -> Array:
    """Memory of this process as an array of bytes."""
    view: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return view


def open_driver() -> Driver:
    """The driver, by cuda-python, or where that is not installed by pycuda.

    Raises:
        MissingExtraError: neither package is installed.
        BackendError: no driver, one too old, no device, or CUDA fails; says which.
    """
    if installed("cuda.bindings"):
        try:
            bindings, runtime = (importlib.import_module(f"cuda.bindings{name}") for name in ("", ".runtime"))
        except Exception as error:  # Its loader has errors of its own.
            raise BackendError(f"cuda-python cannot be imported: {error}.", "Reinstall cuda-python.") from error
        return Driver(runtime, "cuda-python", str(getattr(bindings, "__version__", "")))
    if installed("pycuda"):
        from sparsifiner_edge.runtime.cuda.pycuda import PyCudaDriver

        return PyCudaDriver()
    raise MissingExtraError("cuda-python or pycuda", "gpu" if jetson_release() is None else "jetson")


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
    """What is wrong with a release of cuda-python for a driver that takes CUDA up to `driver`, and what to do; None
    where it fits: one of its own major version, or newer. Else CUDA says no more than cudaErrorInsufficientDriver.
    """
    if major(version) <= major(driver):
        return None
    what = f"cuda-python {version} needs a driver for CUDA {major(version)}, and this one takes CUDA {driver} at most."
    if major(driver) < major(OLDEST_CUDA):
        return what, f"Update the driver (on a Jetson: JetPack): CUDA {OLDEST_CUDA} is the oldest that is supported."
    return what, f'pip install "cuda-python>={OLDEST_CUDA},<{major(driver) + 1}"'


_FIXES = {
    "INSUFFICIENTDRIVER|SYSTEMDRIVERMISMATCH|STUBLIBRARY":
        "Install or update NVIDIA's driver (a Jetson's comes with JetPack); `sparsifiner-edge doctor` says what fits.",
    "NODEVICE": "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
    "MEMORYALLOCATION|OUTOFMEMORY":
        "The device is out of memory: end other programs on it, or take a smaller batch or image.",
    "ILLEGALADDRESS|LAUNCHFAIL|LAUNCHTIMEOUT|ECCUNCORRECTABLE|HARDWARESTACK|CONTEXTISDESTROYED|ASSERT|MISALIGNED|"
    "INVALIDPC|ILLEGALINSTRUCTION|INVALIDUNKNOWNERRORCODE|DEVICEUNAVAILABLE":
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
