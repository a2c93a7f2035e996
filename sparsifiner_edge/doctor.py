"""What is installed, what works, and what to do about the rest. Needs the base install alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys

import msgspec

from sparsifiner_edge.camera.confine import Confinement, confinement
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.machine import Environment, Machine, environment, machine, package_version
from sparsifiner_edge.ops import native
from sparsifiner_edge.quiet import NO_TELEMETRY
from sparsifiner_edge.records import Known, Unavailable
from sparsifiner_edge.runtime.cuda import CudaDevice, probe
from sparsifiner_edge.runtime.cuda.driver import too_new
from sparsifiner_edge.runtime.cuda.support import CudaSupport, cuda_support
from sparsifiner_edge.runtime.onnxruntime.session import CUDA, FALLBACK, OnnxRuntime
from sparsifiner_edge.runtime.openvino.session import OpenVino
from sparsifiner_edge.runtime.processor import ProcessorBackend
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.full import TensorRt
from sparsifiner_edge.runtime.tensorrt.rtx import TensorRtRtx

DISTRIBUTION = "sparsifiner-edge"
_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?.*?extra\s*==\s*['\"](?P<extra>[^'\"]+)"
)


class BackendState(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether something can be used here, and why, or why not; options: the same of its precisions and providers."""

    available: bool
    reason: str
    version: str | Unavailable
    options: dict[str, BackendState] = {}


class Extra(msgspec.Struct, frozen=True):
    """An extra of this distribution: its packages' versions, whether all are there, and what installs them."""

    packages: dict[str, str | Unavailable]
    complete: bool
    install: str


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """This installation.

    Attributes:
        native_library: its path, or None, with the reason.
        telemetry: per library "off", or what switches it on.
        decoding: what confines the process that decodes videos and streams here.
    """

    native_library: str | None
    native_library_reason: str
    backends: dict[str, BackendState]
    cuda: Known[CudaDevice]
    cuda_support: CudaSupport
    triton: BackendState
    telemetry: dict[str, str]
    decoding: Confinement
    extras: Known[dict[str, Extra]]
    warnings: list[str]
    machine: Machine
    environment: Environment


def examine() -> Findings:
    """Look at this installation."""
    device, support = _cuda(), cuda_support()
    library, reason = _native_library()
    return Findings(
        native_library=library,
        native_library_reason=reason,
        backends={
            "onnxruntime": _processor(OnnxRuntime, _providers(device)),
            "openvino": _processor(OpenVino),
            "tensorrt": _engines(TensorRt(), device, "builds engines for the GPU of this machine"),
            "tensorrt-rtx": _engines(TensorRtRtx(), device, "builds engines ahead of time for RTX cards"),
        },
        cuda=device,
        cuda_support=support,
        triton=_triton(),
        telemetry=_telemetry(),
        decoding=confinement(),
        extras=_extras(),
        warnings=[*_two_onnxruntimes(), *_cuda_python_too_new(support)],
        machine=machine(),
        environment=environment(),
    )


def _native_library() -> tuple[str | None, str]:
    try:
        reason = native.why_unusable()
    except ValueError as error:
        reason = f"cannot be used: {error}"
    if reason is not None:
        return None, reason
    return str(native.library_path()), f"loads, and uses {native.target()}"


def _cuda() -> Known[CudaDevice]:
    """The device 0, or why there is none; nothing of TensorRT's may be touched where there is none."""
    try:
        return probe()
    except SparsifinerError as error:
        return Unavailable(f"{error.what} {error.fix}")


def _processor(kind: type[ProcessorBackend], providers: dict[str, BackendState] | None = None) -> BackendState:
    """A backend of the processor, its precisions beside that of the file, and its providers."""
    options = {}
    for precision in kind.computes[1:]:
        how = "computes on the processor in" if kind is OpenVino else "attention computes in"
        options[f"--precision {precision}"] = _loads(
            kind, f"{how} {precision}", Execution(backend=kind.name, precision=precision)
        )
    found = _loads(kind, "imports, and runs on the processor", Execution(backend=kind.name))
    return msgspec.structs.replace(found, options=options | (providers or {}))


def _loads(kind: type[ProcessorBackend], reason: str, execution: Execution) -> BackendState:
    try:
        version = str(kind(execution).load().__version__)
    except SparsifinerError as error:
        return BackendState(False, f"{error.what} {error.fix}", package_version(kind.name))
    return BackendState(True, reason, version)


def _providers(device: Known[CudaDevice]) -> dict[str, BackendState]:
    """That a build offers a provider says nothing about the machine: it does so without any GPU."""
    does = f"a fallback: {FALLBACK}; whether it starts is seen when a bundle is opened"
    state = _loads(OnnxRuntime, f"{CUDA} is built in; {does}", Execution(provider="cuda"))
    if state.available and isinstance(device, Unavailable):
        state = BackendState(False, f"{CUDA} is built in, and {device.why}", state.version)
    return {"--provider cuda": state}


def _engines(backend: TensorRtBackend, device: Known[CudaDevice], skill: str) -> BackendState:
    """A backend that runs engines: they run where there is a device; TensorRT-RTX also builds where there is none."""
    try:
        version = str(backend.load().__version__)
    except SparsifinerError as error:
        return BackendState(False, f"{error.what} {error.fix}", _tensorrt_version(backend.name))
    device = _taken(backend, device)
    if not isinstance(device, Unavailable):
        return BackendState(True, f"imports; {skill}, and runs them on {device.name}", version)
    ahead = isinstance(backend, TensorRtRtx)
    does = f"{skill}, and cannot run them here" if ahead else "cannot be used here"
    return BackendState(ahead, f"imports; {does}: {device.why}", version)


def _taken(backend: TensorRtBackend, device: Known[CudaDevice]) -> Known[CudaDevice]:
    """The device, unless its driver is older than what the backend's package is built for."""
    try:
        if not isinstance(device, Unavailable):
            backend.require_driver(device)
    except SparsifinerError as error:
        return Unavailable(f"{error.what} {error.fix}")
    return device


def _tensorrt_version(name: str) -> str | Unavailable:
    """Version of the package, which CUDA's major version may be part of the name of."""
    found = [package_version(f"{name}{suffix}") for suffix in ("", "-cu12", "-cu13")]
    return next((version for version in found if isinstance(version, str)), found[0])


def _triton() -> BackendState:
    """Triton compiles kernels at export, and with a GPU runs them in training."""
    try:
        module = importlib.import_module("triton")
    except ModuleNotFoundError:
        reason = f'is not installed. pip install "{DISTRIBUTION}[triton]"'
        return BackendState(False, reason, package_version("triton"))
    except Exception as error:  # Its own library may not load.
        return BackendState(False, f"cannot be imported: {error}", package_version("triton"))
    return BackendState(True, "imports; compiles kernels for boards, with or without a GPU", str(module.__version__))


def _telemetry() -> dict[str, str]:
    """Whether a library may report its use from here: "off", or what switches it on."""
    name = "ORT_DISABLE_TELEMETRY"
    value = os.environ.get(name, "")
    reports = sys.modules.get("openvino_telemetry") is not None
    return {
        "openvino": "on: openvino_telemetry was imported by others" if reports else "off",
        "onnxruntime": "off" if value == NO_TELEMETRY[name] else f"on: {name} is set to {value!r} in the environment",
    }


def _extras() -> Known[dict[str, Extra]]:
    """Every extra's packages, from the installed metadata, so that no second list can go out of date."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Unavailable(f"{DISTRIBUTION} runs from its source folder; install it with pip to see its extras")
    wanted: dict[str, list[tuple[str, list[str]]]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            nested = [extra.strip() for extra in (match["extras"] or "").split(",") if extra.strip()]
            wanted.setdefault(match["extra"], []).append((match["name"], nested))
    return {extra: _extra(extra, _expand(wanted, extra)) for extra in wanted}


def _expand(wanted: dict[str, list[tuple[str, list[str]]]], extra: str) -> list[str]:
    """Packages of an extra, where "sparsifiner-edge[cpu]" stands for those of another."""
    names: dict[str, None] = {}
    for name, nested in wanted.get(extra, []):
        inner = [n for other in nested for n in _expand(wanted, other)] if name == DISTRIBUTION else [name]
        names |= dict.fromkeys(inner)
    return list(names)


def _extra(extra: str, names: list[str]) -> Extra:
    packages = {name: package_version(name) for name in names}
    complete = all(isinstance(version, str) for version in packages.values())
    return Extra(packages, complete, f'pip install "{DISTRIBUTION}[{extra}]"')


def _two_onnxruntimes() -> list[str]:
    both = ("onnxruntime", "onnxruntime-gpu")
    if any(isinstance(package_version(name), Unavailable) for name in both):
        return []
    return [
        "onnxruntime and onnxruntime-gpu are both installed and overwrite one another. "
        "Remove both and install one: pip uninstall -y onnxruntime onnxruntime-gpu"
    ]


def _cuda_python_too_new(support: CudaSupport) -> list[str]:
    version = package_version("cuda-python")
    if isinstance(version, Unavailable) or isinstance(support.driver, Unavailable):
        return []
    unfit = too_new(version, support.driver)
    return [" ".join(unfit)] if unfit else []
