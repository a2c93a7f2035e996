"""Check of this installation: installed packages, working backends, and fixes. Needs only the base install."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re

import msgspec

from sparsifiner_edge.camera.confine import Confinement, confinement
from sparsifiner_edge.errors import SparsifinerError, pip_install
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.machine import Environment, Machine, environment, machine, package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import FROM_PYTHON, REBUILD
from sparsifiner_edge.quiet import NO_TELEMETRY
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.cuda import CudaDevice, CudaSupport, cuda_support, probe, too_new
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.openvino import extension
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend

DISTRIBUTION = "sparsifiner-edge"
TELEMETRY = "ORT_DISABLE_TELEMETRY"
_ON_PROCESSOR = {
    "onnxruntime": Execution(backend="onnxruntime"),
    "onnxruntime, bf16": Execution(backend="onnxruntime", compute_precision="bf16"),
    "onnxruntime, cuda": Execution(backend="onnxruntime", provider="cuda"),
    "openvino": Execution(backend="openvino"),
    "openvino, bf16": Execution(backend="openvino", compute_precision="bf16"),
}
"""Executions that can be checked without a bundle. OpenVINO's fp16 is left out: it depends on the file."""
_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?.*?extra\s*==\s*['\"](?P<extra>[^'\"]+)")


class State(msgspec.Struct, frozen=True):
    """State of a part: whether it is available, and why."""

    available: bool
    reason: str
    version: str | Unavailable


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """Findings about this installation.

    Attributes:
        native_library: Path of the native library; None if it cannot be used.
        native_library_reason: Reason why the library is used or not.
        backends: State by backend and option.
        telemetry: By library, "off" or the variable that switches it on.
        decoding: Confinement of the process that decodes videos and streams.
        extras: Packages and their versions by extra of this distribution.
    """

    native_library: str | None
    native_library_reason: str
    backends: dict[str, State]
    cuda: Known[CudaDevice]
    cuda_support: CudaSupport
    triton: State
    telemetry: dict[str, str]
    decoding: Confinement
    extras: dict[str, dict[str, str | Unavailable]]
    warnings: list[str]
    machine: Machine
    environment: Environment


def examine() -> Findings:
    """Check what is installed here, what works, and why the rest does not.

    Example:
        >>> examine().backends["onnxruntime"].available
        True
    """
    support, device = cuda_support(), _cuda()
    backends = {name: _loads(execution, device) for name, execution in _ON_PROCESSOR.items()}
    backends |= {name: _engines(name, device) for name in ("tensorrt", "tensorrt-rtx")}
    try:
        reason = native.why_unusable()
    except ValueError as error:
        reason = f"cannot be used: {error}"
    value = os.environ.get(TELEMETRY, "")
    return Findings(
        native_library=str(native.library_path()) if reason is None else None,
        native_library_reason=reason or f"loads, and uses {native.target()}",
        backends=backends,
        cuda=device,
        cuda_support=support,
        triton=_triton(),
        telemetry={"onnxruntime": "off" if value == NO_TELEMETRY[TELEMETRY] else f"on: {TELEMETRY} is {value!r}"},
        decoding=confinement(),
        extras=_extras(),
        warnings=_warnings(support),
        machine=machine(),
        environment=environment(),
    )


def _cuda() -> Known[CudaDevice]:
    """Return device 0, or why there is none. Without a device, TensorRT is only imported."""
    try:
        return probe()
    except SparsifinerError as error:
        return Unavailable(f"{error.what} {error.fix}")


def _loads(execution: Execution, device: Known[CudaDevice]) -> State:
    """Check a backend that runs ONNX files. A build that offers CUDA may still lack a device."""
    try:
        version = str(find_backend(execution).load().__version__)
    except SparsifinerError as error:
        return State(False, f"{error.what} {error.fix}", package_version(execution.backend))
    if execution.provider != "cuda":
        slower = execution.backend == "openvino" and native.library_path() and not extension()
        how = f"; operators are {FROM_PYTHON}, which is slower. {REBUILD}" if slower else ""
        return State(True, f"imports, and runs on the CPU{how}", version)
    if isinstance(device, Unavailable):
        return State(False, f"is built in, but {device.why}", version)
    return State(True, "is built in; a fallback, which runs function bodies and not the CUDA kernels", version)


def _engines(name: str, device: Known[CudaDevice]) -> State:
    """Check a backend that runs engines. They need a device; TensorRT-RTX also builds without one."""
    backend = find_backend(Execution(backend=name))
    assert isinstance(backend, TensorRtBackend)
    packages = [package_version(f"{name}{suffix}") for suffix in ("", "-cu12", "-cu13")]
    try:
        version: str | Unavailable = str(backend.load().__version__)
        if not isinstance(device, Unavailable):
            backend.require_driver(device)
            return State(True, f"imports, builds engines, and runs them on {device.name}", version)
    except SparsifinerError as error:
        version = next((each for each in packages if isinstance(each, str)), packages[0])
        return State(False, f"{error.what} {error.fix}", version)
    ahead = "imports, builds engines ahead of time for RTX cards, and cannot run them here"
    return State(
        name == "tensorrt-rtx", f"{ahead if name == 'tensorrt-rtx' else 'cannot be used'}: {device.why}", version
    )


def _triton() -> State:
    """Check Triton, which compiles kernels at export and, with a GPU, runs them in training."""
    try:
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # Its library may fail to load.
        why = f"cannot be imported: {error}. {pip_install('triton')}"
        return State(False, why, package_version("triton"))
    return State(True, "imports; compiles kernels for boards, with or without a GPU", version)


def _extras() -> dict[str, dict[str, str | Unavailable]]:
    """Return the packages of every extra from the installed metadata, so that no second list can go out of date."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # Runs from its source folder.
        return {}
    extras: dict[str, dict[str, str | Unavailable]] = {}
    for match in filter(None, map(_REQUIREMENT.match, requirements)):
        if match["name"] != DISTRIBUTION:
            extras.setdefault(match["extra"], {})[match["name"]] = package_version(match["name"])
    return extras


def _warnings(support: CudaSupport) -> list[str]:
    warnings = []
    if all(isinstance(package_version(name), str) for name in ("onnxruntime", "onnxruntime-gpu")):
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite one another. "
            "Remove both and install one: pip uninstall -y onnxruntime onnxruntime-gpu"
        )
    version = package_version("cuda-python")
    if isinstance(version, str) and not isinstance(support.driver, Unavailable):
        warnings += [" ".join(unfit)] if (unfit := too_new(version, support.driver)) else []
    return warnings
