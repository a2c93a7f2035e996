"""CUDA functions for running engines on the first device, and the CUDA versions that the driver supports.

The functions come from cuda-python, or from pycuda if cuda-python is not installed.

Create a `Driver`, or call `probe`, before any object of TensorRT. Without NVIDIA's driver, TensorRT's objects can be
created all the same, but they end the process when they are used.
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
"""Oldest supported release of cuda-python, and of CUDA on a Jetson."""


class CudaDevice(msgspec.Struct, frozen=True):
    """First CUDA device. `CUDA_VISIBLE_DEVICES` selects which one that is.

    Attributes:
        name: Name of the GPU, such as "NVIDIA L4" or "Orin".
        compute_capability: Compute capability, such as "8.7".
        integrated: True if the device shares the CPU's memory, as on a Jetson.
        driver_version: Newest CUDA version that the driver supports, such as "12.6".
    """

    name: str
    compute_capability: str
    integrated: bool
    driver_version: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


class Driver:
    """CUDA functions for running an engine, on one device. If CUDA fails, methods raise BackendError with its error.

    Attributes:
        runtime: Functions and constants of the CUDA runtime: the module `cuda.bindings.runtime` or its replacement
            `pycuda.PyCuda`.
        package: Package that provides them, such as "cuda-python 13.4.4".
        device: Device on which all resources live.

    Raises:
        MissingExtraError: Neither cuda-python nor pycuda is installed.
        BackendError: There is no driver or no device, the driver is too old, or CUDA fails.
    """

    def __init__(self) -> None:
        self.runtime, self.package, release = _package()
        reason = "CUDA reports version 0"
        try:
            version = int(self.call("to read the driver's version", "cudaDriverGetVersion"))
        except RuntimeError as error:  # Without libcuda.so, in some versions.
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
        """Call a function of the CUDA runtime.

        Args:
            action: Purpose of the call for messages, such as "to free memory".
            function: Name of the function.
            arguments: Arguments of the function.

        Returns:
            The result without the status; a tuple unless there is exactly one.

        Raises:
            BackendError: The function failed.
        """
        status, *values = getattr(self.runtime, function)(*arguments)
        if int(status) != 0:
            meaning = self.runtime.cudaGetErrorString(status)[1]
            name = str(getattr(status, "name", status))
            words = f", {meaning.decode()}" if isinstance(meaning, bytes) else ""
            fix = next(fix for part, fix in _FIXES.items() if re.search(part, name))
            raise BackendError(f"CUDA ({self.package}) failed {action}: {name}{words}.", fix)
        return values[0] if len(values) == 1 else tuple(values)

    def take(self, stack: ExitStack, what: str, function: str, *arguments: Any, free: str) -> int:
        """Create a resource and register the function that frees it.

        Args:
            stack: Frees the resource when it closes.
            what: Name of the resource for messages, such as "an event".
            function: CUDA function that creates the resource.
            arguments: Arguments of that function.
            free: CUDA function that frees the resource.

        Returns:
            The address or handle of the resource.
        """
        handle = int(self.call(f"to make {what}", function, *arguments))
        stack.callback(self.call, f"to free {what}", free, handle)
        return handle

    def use(self) -> None:
        """Select the device in the calling thread; each thread must call this first."""
        self.call("to select the device", "cudaSetDevice", 0)

    def free_bytes(self) -> int:
        """Return the free device memory in bytes."""
        return int(self.call("to read free memory", "cudaMemGetInfo")[0])

    def pin(self, size: int, stack: ExitStack) -> tuple[Array, int]:
        """Allocate page-locked host memory and the device memory that belongs to it.

        An integrated device accesses the host memory itself. On any other device a separate buffer of the same size is
        allocated, and the caller copies between the two.

        Args:
            size: Size in bytes.
            stack: Frees the memory when it closes.

        Returns:
            The host memory as an array of bytes, and the device address.
        """
        flags = self.runtime.cudaHostAllocMapped
        place = self.take(stack, f"{size} pinned bytes", "cudaHostAlloc", size, flags, free="cudaFreeHost")
        host = bytes_at(place, size)
        if self.device.integrated:
            return host, int(self.call("to map", "cudaHostGetDevicePointer", place, 0))
        return host, self.take(stack, f"{size} bytes of the device", "cudaMalloc", size, free="cudaFree")

    def capture(self, stream: int, compute: Callable[[], None], stack: ExitStack) -> Callable[[], None]:
        """Record work on a stream as a CUDA graph.

        Args:
            stream: Handle of the stream.
            compute: Puts the work into the stream.
            stack: Frees the graph when it closes.

        Returns:
            A function that launches the graph on the stream.
        """
        # In this mode other threads may allocate memory meanwhile: only the calls of this thread are restricted.
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
    """Import the CUDA functions from cuda-python or pycuda.

    Returns:
        The functions, the name and version of the package, and the release of cuda-python ("" for pycuda, whose version
        does not determine a version of CUDA).
    """
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
"""`PyCuda`, cached because its context lives as long as the process."""


def probe() -> CudaDevice:
    """Return the CUDA device after a check that CUDA works.

    Raises:
        MissingExtraError: Neither cuda-python nor pycuda is installed.
        BackendError: CUDA cannot be used; see `Driver`.
    """
    return Driver().device


def version_text(number: int) -> str:
    """Convert CUDA's version number to text, such as 12060 to "12.6"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def major(version: str) -> int:
    """Return the major version, such as 12 for "12.9.10", or 0 if the text does not begin with a number."""
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


def too_new(version: str, driver: str) -> tuple[str, str] | None:
    """Check whether a release of cuda-python is too new for the driver.

    It fits if its major version is at most that of the driver. Otherwise CUDA would fail with nothing but
    cudaErrorInsufficientDriver.

    Args:
        version: Release of cuda-python.
        driver: Newest CUDA version that the driver supports.

    Returns:
        None if the release fits; otherwise the problem and the advice.
    """
    if major(version) <= major(driver):
        return None
    what = f"cuda-python {version} needs a driver for CUDA {major(version)}, and this one takes CUDA {driver} at most."
    if major(driver) < major(OLDEST_CUDA):
        return what, f"Update the driver (on a Jetson: JetPack): CUDA {OLDEST_CUDA} is the oldest that is supported."
    return what, f'pip install "cuda-python>={OLDEST_CUDA},<{major(driver) + 1}"'


_DRIVER = "Install or update NVIDIA's driver (a Jetson's comes with JetPack); `sparsifiner-edge doctor` says what fits."
"""Advice for a driver that is missing or too old."""
_FIXES = {
    "InsufficientDriver": _DRIVER,
    "SystemDriverMismatch|StubLibrary": _DRIVER,
    "NoDevice": "Check that the machine has an NVIDIA GPU and that CUDA_VISIBLE_DEVICES does not hide it.",
    "MemoryAllocation": "The device is out of memory: end other programs on it, or take a smaller batch or image.",
    "IllegalAddress|LaunchFail|LaunchTimeout|ECCUncorrectable|HardwareStack|ContextIsDestroyed|Assert|Misaligned|"
    "InvalidPc|IllegalInstruction|DeviceUnavailable|Unknown": (
        "This process lost the device. Restart the process; if it happens again, build the engine again."
    ),
    "": "Restart the process. If the error persists, report it with the output of `sparsifiner-edge doctor`.",
}
"""Advice by a regular expression for the error's name. The first match counts; the last entry matches every name."""
_LEAST_JETSON = 36
"""Major release of Jetson Linux in JetPack 6, the oldest JetPack with CUDA 12."""


class CudaSupport(msgspec.Struct, frozen=True):
    """CUDA support of a machine's driver.

    Attributes:
        driver: Newest CUDA version that the driver supports, such as "12.6".
        jetson: Release of Jetson Linux, such as "36.4.3"; None if the machine is not a Jetson.
        install: Packages to install for this driver, or the required first step.
    """

    driver: Known[str]
    jetson: str | None
    install: str


def cuda_support() -> CudaSupport:
    """Return the CUDA support of this machine's driver. On a Jetson there is no `nvidia-smi` that reports it."""
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
    """Return the newest CUDA version that the driver supports, as its own library reports it."""
    number = ctypes.c_int()
    try:
        status = int(ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)))
    except (OSError, AttributeError) as error:
        return Unavailable(f"no NVIDIA driver: {error}")
    if status:
        return Unavailable(f"NVIDIA's driver did not report its version: CUDA error {status}")
    return version_text(number.value)
