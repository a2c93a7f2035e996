"""Which CUDA the driver of this machine takes, and which extra fits it. Needs no package of CUDA's."""

from __future__ import annotations

import ctypes

import msgspec

from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.cuda.driver import OLDEST_CUDA, major, version_text

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
    return CudaSupport(driver, jetson, _install(driver, jetson))


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


def _install(driver: Known[str], jetson: str | None) -> str:
    if jetson and major(jetson) < _LEAST_JETSON:
        return f"Jetson Linux {jetson} is older than JetPack 6: upgrade it"
    if jetson:
        return 'pip install "sparsifiner-edge[jetson]"; TensorRT comes with JetPack, never with pip (docs/jetson.md)'
    if isinstance(driver, Unavailable):
        return "install NVIDIA's driver first"
    if major(driver) < major(OLDEST_CUDA):
        return f"update the driver first: it must take CUDA {OLDEST_CUDA}"
    newer = "; or gpu-cu13, tensorrt-cu13" if major(driver) > major(OLDEST_CUDA) else ""
    return f'pip install "sparsifiner-edge[gpu,tensorrt]"{newer}'
