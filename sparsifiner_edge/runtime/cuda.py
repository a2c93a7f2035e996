"""CUDA as far as running an engine needs it, on the first device, by cuda-python, or where that is not installed by
pycuda; what the driver takes.

No object of TensorRT may exist before a `Driver` does, or `probe` has succeeded: without NVIDIA's driver TensorRT's own
objects come up all the same and end the process when they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec

from sparsifiner_edge.arrays import Array, bytes_at
from sparsifiner_edge.errors import BackendError, MissingExtraError, pip_install
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.backend import import_package
from sparsifiner_edge.runtime.pycuda import PyCuda
from sparsifiner_edge.text import one_line

OLDEST_CUDA = "12.6"
"""The oldest release of cuda-python, and of CUDA on a Jetson, that is supported."""


class CudaDevice(msgspec.Struct, frozen=True):
    """CUDA's first device; `CUDA_VISIBLE_DEVICES` says which one that is.

    Attributes:
        name: such as "NVIDIA L4" or "Orin". compute_capability: such as "8.7".
        integrated: it shares the processor's memory, as on a Jetson.
        driver_version: the newest CUDA that the driver supports, such as "12.6".
    """

    name: str
    compute_capability: str
    integrated: bool
    driver_version: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


class Driver:
    """What running an engine needs of CUDA, on one device. Methods raise BackendError with CUDA's name of the error.

    Attributes:
        runtime: CUDA's functions and constants: the module `cuda.bindings.runtime`, or what stands in its place.
        package: such as "cuda-python 13.4.4". device: the device that everything lives on.

    Raises:
        MissingExtraError: neither package is installed.
        BackendError: no driver, one too old, no device, or CUDA fails; says which.
    """

    def __init__(self) -> None:
        self.runtime, self.package, release = _package()
        reason = "CUDA gives 0 as its version"
        try:
            version = int(self.call("to read the driver's version", "cudaDriverGetVersion"))
        except RuntimeError as error:  # cuda-python up to 12.8 and from its path finder on: no libcuda.so.
            version, reason = 0, one_line(error, 200)
        if version == 0:
            raise BackendError(f"No NVIDIA driver ({self.package}: {reason}).", _FIXES["InsufficientDriver"])
        if unfit := too_new(release, version_text(version)):
            raise BackendError(*unfit)
        if int(self.call("to count devices", "cudaGetDeviceCount")) < 1:
            raise BackendError("CUDA finds no device.", _FIXES["NoDevice"])
        self.use()
        properties = self.call("to describe the device", "cudaGetDeviceProperties", 0)
        name = properties.name.decode("utf-8", "replace") if isinstance(properties.name, bytes) else properties.name
        capability = f"{int(properties.major)}.{int(properties.minor)}"
        self.device = CudaDevice(str(name).strip("\0 "), capability, bool(properties.integrated), version_text(version))

    def call(self, action: str, function: str, *arguments: Any) -> Any:
        """Call a CUDA function; returns its values without the status. `action`: such as "to free memory"."""
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status) != 0:
            meaning = self.runtime.cudaGetErrorString(status)[1]
            name = str(getattr(status, "name", status))
            words = f", {meaning.decode()}" if isinstance(meaning, bytes) else ""
            fix = next(fix for part, fix in _FIXES.items() if re.search(part, name))
            raise BackendError(f"CUDA ({self.package}) failed {action}: {name}{words}.", fix)
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

    def pin(self, size: int, stack: ExitStack) -> tuple[Array, int]:
        """Page-locked bytes of the processor, and a device address: on an integrated device of the same bytes, else
        of as many of its own, which they are copied to.
        """
        flags = self.runtime.cudaHostAllocMapped
        place = self.take(stack, f"{size} pinned bytes", "cudaHostAlloc", size, flags, free="cudaFreeHost")
        host = bytes_at(place, size)
        if self.device.integrated:
            return host, int(self.call("to map", "cudaHostGetDevicePointer", place, 0))
        return host, self.take(stack, f"{size} bytes of the device", "cudaMalloc", size, free="cudaFree")

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


def _package() -> tuple[Any, str, str]:
    """CUDA's functions, the package that gives them, and the release of it that has a CUDA of its own."""
    extra, fix = "gpu" if jetson_release() is None else "jetson", "Reinstall cuda-python."
    try:
        release = str(getattr(import_package("cuda.bindings", "cuda-python", extra, fix), "__version__", ""))
        module = import_package("cuda.bindings.runtime", "cuda-python", extra, fix)
        return module, f"cuda-python {release}".strip(), release
    except MissingExtraError as missing:
        try:
            text = str(getattr(import_package("pycuda", "pycuda", extra, "Reinstall pycuda."), "VERSION_TEXT", ""))
            module = import_package("pycuda.driver", "pycuda", extra, "Install NVIDIA's driver, or reinstall pycuda.")
        except MissingExtraError:
            raise missing from None
        return _by_pycuda(module), f"pycuda {text}".strip(), ""


_by_pycuda = functools.cache(PyCuda)
"""One for a process: its context lives as long."""


def probe() -> CudaDevice:
    """The CUDA device, after CUDA itself has answered.

    Raises:
        MissingExtraError, BackendError: see `Driver`.
    """
    return Driver().device


def version_text(number: int) -> str:
    """CUDA's 12060 -> "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def major(version: str) -> int:
    """The first number of a version, such as 12 of "12.9.10"; 0 where there is none."""
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


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


_DRIVER = "Install or update NVIDIA's driver (a Jetson's comes with JetPack); `sparsifiner-edge doctor` says what fits."
_FIXES = {
    "InsufficientDriver": _DRIVER,
    "SystemDriverMismatch|StubLibrary": _DRIVER,
    "NoDevice": "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
    "MemoryAllocation": "The device is out of memory: end other programs on it, or take a smaller batch or image.",
    "IllegalAddress|LaunchFail|LaunchTimeout|ECCUncorrectable|HardwareStack|ContextIsDestroyed|Assert|Misaligned|"
    "InvalidPc|IllegalInstruction|DeviceUnavailable|Unknown": (
        "The device is lost to this process: start it again; if it happens again, build the engine again."
    ),
    "": "Start again; if it stays, report it with the output of `sparsifiner-edge doctor`.",
}
"""What to do, by a part of the error's name; the first that is found counts."""
_LEAST_JETSON = 36
"""Major release of Jetson Linux in JetPack 6, the first with CUDA 12."""


class CudaSupport(msgspec.Struct, frozen=True):
    """What NVIDIA's driver takes.

    Attributes:
        driver: the newest CUDA that it supports, such as "12.6".
        jetson: the release of Jetson Linux, such as "36.4.3"; None on another machine.
        install: what to install for it, or what must come first.
    """

    driver: Known[str]
    jetson: str | None
    install: str


def cuda_support() -> CudaSupport:
    """What this machine's driver takes. A Jetson has no `nvidia-smi` that would say so."""
    driver, jetson = driver_version(), jetson_release()
    if jetson and major(jetson) < _LEAST_JETSON:
        install = f"Jetson Linux {jetson} is older than JetPack 6: upgrade it"
    elif jetson:
        install = f"{pip_install('jetson')}; TensorRT comes with JetPack, never with pip (docs/jetson.md)"
    elif isinstance(driver, Unavailable):
        install = "install NVIDIA's driver first"
    elif major(driver) < major(OLDEST_CUDA):
        install = f"update the driver first: it must take CUDA {OLDEST_CUDA}"
    else:
        newer = "; or gpu-cu13, tensorrt-cu13" if major(driver) > major(OLDEST_CUDA) else ""
        install = f"{pip_install('gpu,tensorrt')}{newer}"
    return CudaSupport(driver, jetson, install)


def driver_version() -> Known[str]:
    """The newest CUDA that the driver supports, as the driver's own library says."""
    number = ctypes.c_int()
    try:
        status = int(ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)))
    except (OSError, AttributeError) as error:
        return Unavailable(f"no NVIDIA driver: {error}")
    if status:
        return Unavailable(f"NVIDIA's driver does not say its version: CUDA error {status}")
    return version_text(number.value)
